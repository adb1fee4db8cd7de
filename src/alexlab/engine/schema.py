"""Every key of every command: type, range, default, and one line that says what the key does.

The config of a command is a frozen model (`TrainConfig`, `EvalConfig`, ...) with one model per group of `conf/`.
`validation.py` checks a composed config against it and reports all mistakes at once. Nothing is converted:
`model_dump(exclude_unset=True)` equals the composed config, types included (1 stays an integer, 1.0 a float).

A default is used if no yaml sets the key, so that your own option may be short and configs of older runs stay valid.
Your own keys belong in the section `my`. A mapping with a `_target_` takes any key and passes it to that class.

This module imports neither torch nor Lightning nor numpy, because `--help` must be fast.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from alexlab.engine.config import ROOT, local_logs
from alexlab.engine.metrics import lower_is_better

Plain = dict[str, Any]

# -- Types of values. `validation.py` derives messages from the type and the bounds, or takes them from a Rule.


@dataclass(frozen=True)
class Rule:
    """A rule that a type alone cannot express."""

    words: str  # what a value must be, as the end of "must be ..."
    test: Callable[[Any], Any] = lambda value: True  # checks a value that has the right type

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._check, handler(source))

    def _check(self, value: Any, validate: Callable[[Any], Any]) -> Any:
        """Refuse a value of another type, too, so that one message names the whole rule."""
        try:
            value = validate(value)
        except ValidationError:
            raise ValueError(self.words) from None
        if not self.test(value):
            raise ValueError(self.words)
        return value


def _has_target(node: Plain) -> bool:
    return isinstance(node.get("_target_"), str) and node["_target_"] != ""


def _is_name(text: str) -> bool:
    return text != "" and text == text.strip() and not set(text) & set("/\\#?%:")


def _names_weights(text: str) -> bool:
    if not text.startswith("wandb:"):
        return text != "" and "://" not in text
    path, _, alias = text.removeprefix("wandb:").partition(":")
    parts = path.split("/")
    return len(parts) == 3 and all(_is_name(part) and part.strip(".") for part in parts) and _is_name(alias or "latest")


def _are_sizes(pairs: list[list[int]]) -> bool:
    if not pairs or any(len(pair) != 2 for pair in pairs):
        return False
    epochs, pixels = zip(*pairs, strict=True)
    return epochs[0] == 1 and all(a < b for a, b in itertools.pairwise(epochs)) and min(pixels) >= 8


def _are_devices(value: str | int | list[int]) -> bool:
    if isinstance(value, list):
        return len(value) > 0 and min(value) >= 0 and len(set(value)) == len(value)
    return value == "auto" or (isinstance(value, int) and value > 0)


Text = Annotated[str, Rule("a text that is not empty", bool)]
# what W&B accepts
Tag = Annotated[str, Rule("a text of 1 to 64 letters", lambda text: 1 <= len(text) <= 64)]
Label = Annotated[str, Rule("a text of 1 to 128 letters", lambda text: 1 <= len(text) <= 128)]
Target = Annotated[Plain, Rule("a mapping with a _target_, which names a class", _has_target)]
TARGETS = Rule("a list of mappings, each with a _target_, which names a class", lambda v: all(map(_has_target, v)))
TargetList = Annotated[list[Plain], TARGETS]
Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Pixels = Annotated[int, Ge(8)]
HEIGHT_WIDTH = Rule("[height, width] of at least 8 each", lambda v: len(v) == 2 and min(v) >= 8)
ImageSize = Pixels | Annotated[list[int], HEIGHT_WIDTH]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Number = int | float
Numbers = list[Number]
Positive = Annotated[int, Gt(0)] | Annotated[float, Gt(0)]
NotNegative = Annotated[int, Ge(0)] | Annotated[float, Ge(0)]
Fraction = Annotated[int, Ge(0), Le(1)] | Annotated[float, Ge(0), Le(1)]
Below1 = Annotated[int, Ge(0), Lt(1)] | Annotated[float, Ge(0), Lt(1)]
Inside01 = Annotated[int, Gt(0), Lt(1)] | Annotated[float, Gt(0), Lt(1)]
UpTo1 = Annotated[int, Gt(0), Le(1)] | Annotated[float, Gt(0), Le(1)]
ANY_BATCHES = Rule("a fraction from 0.0 to 1.0, or a whole number of batches")
SOME_BATCHES = Rule("a fraction above 0.0 and at most 1.0, or a whole number of batches of at least 1")
Batches = Annotated[Annotated[int, Ge(0)] | Annotated[float, Ge(0), Le(1)], ANY_BATCHES]
SomeBatches = Annotated[Annotated[int, Ge(1)] | Annotated[float, Gt(0), Le(1)], SOME_BATCHES]
# Lightning would download a web address, and run code in that file.
A_RUN = "a run or a local file, no web address; for a run in a bucket, give the name, and paths.logs=s3://BUCKET/PATH"
LocalPath = Annotated[str, Rule(A_RUN, lambda text: text != "" and "://" not in text)]
LocalFolder = Annotated[str, Rule("a folder of this machine, no address", lambda text: text and "://" not in text)]
LOGS = Rule("a folder, or s3://BUCKET/PATH", lambda text: text and re.match(r"s3://|(?!\w+:/)", text))
Logs = Annotated[str, LOGS]
WEIGHTS = "a run, a file, a folder of format=hub, hub:USER/NAME, or wandb:ENTITY/PROJECT/ARTIFACT"
WEIGHTS += ", with :ALIAS if it is not the latest version"
Weights = Annotated[str, Rule(WEIGHTS, _names_weights)]
Name = Annotated[str, Rule("a name without spaces around it and without / \\ # ? % :", _is_name)]
WANDB_RUN = Rule(
    "ENTITY/PROJECT/RUN, where RUN is the last part of the address of the run's page",
    lambda text: text.count("/") == 2 and all(map(_is_name, text.split("/"))),
)
EACH = Rule("one number for each channel", bool)
EACH_POSITIVE = Rule("one number above 0 for each channel", lambda v: min(v, default=0) > 0)
AREA_RANGE = "a min and a max fraction of the area, above 0 and at most 1"
Areas = Annotated[Numbers, Rule(AREA_RANGE, lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1)]
Ratios = Annotated[Numbers, Rule("a min and a max aspect ratio, above 0", lambda v: len(v) == 2 and 0 < v[0] <= v[1])]
SIZES = Rule("pairs of a first epoch, from 1 on, and at least 8 pixels, as [[1, 128], [31, 176]]", _are_sizes)
Sizes = Annotated[list[list[int]], SIZES]
BETAS = Rule("two or three numbers from 0 to below 1", lambda v: len(v) in (2, 3) and all(0 <= b < 1 for b in v))
MILESTONES = Rule("growing numbers above 0", lambda v: v == sorted(set(v)) and min(v, default=1) > 0)
Steps = Annotated[int, Rule("a whole number of at least 1, or -1 for no limit", lambda v: v == -1 or v > 0)]
DEVICES = Rule("auto, a whole number above 0, or a list of different GPU numbers", _are_devices)
Devices = Annotated[Literal["auto"] | int | list[int], DEVICES]
DAYS = re.compile(r"\d+:\d\d:\d\d:\d\d")
MaxTime = Annotated[str, Rule('a text "DAYS:HOURS:MINUTES:SECONDS", in quotes', DAYS.fullmatch)]
VALIDATED = Rule("a metric of the validation, such as val/acc1 or val/loss", lambda v: v.startswith("val/"))
Metric = Annotated[str, VALIDATED]
Accelerator = Literal["auto", "cpu", "gpu", "cuda", "mps"]
PrecisionText = Literal["auto", "32", "32-true", "bf16", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"]
Precision = PrecisionText | Literal[16, 32, 64]


class Group(BaseModel):
    """A mapping of known keys, which is frozen, converts no values, and forbids unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True, defer_build=True
    )


class OpenGroup(Group):
    """A group whose option names a class as `_target_`; all keys but ours are arguments of the class."""

    model_config = ConfigDict(extra="allow")


class GroupOfTargets(OpenGroup):
    """A group whose further entries are mappings, each with a `_target_`."""

    __pydantic_extra__: dict[str, Target]


def key(description: str, default: Any = ..., alias: str | None = None, **hints: str) -> Any:
    """Declare a key.

    Args:
        description: one line for --help.
        default: the value if no yaml sets the key, or the class of a group. A key without a default is required.
        alias: the name in yaml, if Python does not allow it as the name of a field.
        hints: for the message if the key is missing: `give`, the end of "is missing: give ..."; or, for a group of
            conf/, `option`, an example of an option.
    """
    more: Any = {"default_factory" if isinstance(default, type) else "default": default}
    return Field(description=description, alias=alias, json_schema_extra={**hints}, **more)


# -- The groups of `alexlab train`


class ModelTraining(Group):
    """Values with which the network learns. conf/optimizer/sgd.yaml and conf/scheduler refer to them."""

    lr: Positive = key("Learning rate for optimizer=sgd.", 0.005)
    warmup: NotNegative = key("Length of the warm-up of cosine, linear and wsd.", 1)
    weight_decay: NotNegative = key("Weight decay for optimizer=sgd.", 5.0e-4)


class ModelConfig(Group):
    name: Text = key("Name of the network; model=torchvision and model=timm build the network of this name.")
    pretrained: bool = key("Start from published ImageNet weights.", False)
    in_channels: Count = key("Channels of the images: files are read as 1 (grey), 3 (RGB) or 4 (RGBA).", 3)
    mean: Literal["auto"] | Annotated[Numbers, EACH] = key(
        "Mean of each channel: the net gets (pixel / 255 - mean) / std; auto: as published with the weights."
    )
    std: Literal["auto"] | Annotated[Numbers, EACH_POSITIVE] = key("Standard deviation; auto: as published.")
    bias_lr_factor: Positive = key("Factor on the learning rate of biases; read by conf/optimizer.", 1.0)
    training: ModelTraining = key("Values with which the net learns, unless optimizer.* sets them.", ModelTraining)
    net: Target = key("The network: the class as _target_, and the arguments of the constructor.")


class DataConfig(OpenGroup):
    """The images (conf/data). With a `_target_`, further keys are arguments of that class; without it, mistakes."""

    target: Text | None = key("A class of images; null is for folders.", None, alias="_target_")
    name: Text = key("Name of the data, in tables and run names.")
    root: Text | None = key("Folder of the images.", give="the folder of the images with data.root=PATH")
    idx: Text | None = key("Fashion-MNIST only: folder of the four idx files; auto finds or downloads them.", None)
    multilabel: bool = key("Each image has a list of labels; task=multilabel sets it.", False)
    demo_seed: Whole | None = key("Demo only: seed of the drawings.", None)
    batch_size: Count = key("Images per step, all devices together.")
    image_size: ImageSize = key("Side of the images that the network gets, in pixels, or [height, width].")
    num_workers: Whole | None = key("Decoding threads per device; null takes the available cores, at most 12.", None)
    num_classes: Annotated[int, Ge(2)] | None = key("Classes that the data must have; null counts them.", None)
    val_fraction: Inside01 | None = key("Fraction of each class to hold out for validation if there is no val/.", None)
    test_fraction: Below1 = key("Fraction of each class to hold out for the test if there is no test/.", 0.0)
    folds: Annotated[int, Ge(2)] | None = key("Folds of a cross-validation; null has none.", None)
    fold: Whole | None = key("Fold to validate on, from 0 to folds - 1; the rest is trained on.", None)
    sampler: Literal["shuffle", "balanced", "weighted"] = key(
        "shuffle: each image once per epoch; balanced: classes equally often; weighted: by the table's weights.",
        "shuffle",
    )
    on_error: Literal["raise", "skip"] = key("Broken images: raise an error, or skip and list them.", "raise")
    max_bad: Whole | None = key("Broken images that may be skipped, all splits together; null is any number.", 100)
    crop_on: Literal["auto", "cpu", "device"] = key("Where to crop; auto: the GPU, for pixels of one size.", "auto")
    cache: Literal["device"] | None = key(
        "Cache the images of train and val on the device, which then crops them too.", None
    )
    class_names: Text | None = key("Class names: imagenet, fashion_mnist, or a file of lines: folder, tab, name.", None)


class AugmentConfig(Group):
    crop: Literal["random_resized", "random", "center", "none"] = key("How training images are cropped.", "center")
    scale: Areas = key("Min and max fraction of the area for random_resized.", [0.08, 1.0])
    ratio: Ratios = key(
        "Min and max aspect for random_resized, relative to that of image_size.", [0.75, 1.3333333333333333]
    )
    sizes: Sizes | None = key("[[first epoch, pixels], ...] of training images; null: data.image_size.", None)
    crop_ratio: UpTo1 = key("image_size / short side for random and center, and in evaluation (224 / 256).", 0.875)
    flip: Fraction = key("Probability of a horizontal flip.", 0.0)
    policy: Literal["none", "trivial", "rand"] = key("trivial: TrivialAugmentWide, rand: RandAugment.", "none")
    policy_ops: Count = key("Operations per image for rand.", 2)
    policy_magnitude: Annotated[int, Ge(0), Le(30)] = key("Strength of rand.", 9)
    pca: NotNegative = key("Standard deviation of PCA colour noise (paper: 0.1); 0 is off.", 0.0)
    pca_by: Literal["eigenvalues", "deviations"] = key("Scale of the noise; deviations are their roots.", "eigenvalues")
    erase: Fraction = key("Probability of erasing a rectangle.", 0.0)
    mixup: NotNegative = key("Beta parameter of mixup; 0 is off.", 0.0)
    cutmix: NotNegative = key("Beta parameter of CutMix; 0 is off.", 0.0)
    transforms: TargetList = key("Transforms of single images, on the CPU after the crop.", [])
    batch: Target | None = key("A transform of whole batches, on the device.", None)


class OptimizerConfig(OpenGroup):
    """The optimizer (conf/optimizer). The class gets momentum, nesterov, betas and further keys, if they are set."""

    target: Text = key("The optimizer's class.", alias="_target_")
    lr: Positive = key("Learning rate at the global batch size, or at lr_reference_batch.")
    weight_decay: NotNegative = key("Weight decay of the weights of convolutions and linear layers.", 0.0)
    momentum: Below1 = key("Momentum, for classes that have it.", 0.0)
    nesterov: bool = key("Nesterov momentum, for classes that have it.", False)
    betas: Annotated[Numbers, BETAS] = key("Decay of Adam's averages, for classes that have it.", [0.9, 0.999])
    decay_norm_and_bias: bool = key("Decay normalization layers and biases too.", False)
    lr_reference_batch: Count | None = key("Images per step that lr is meant for, to scale it with the batch.", None)
    bias_lr_factor: Positive = key("Factor on the learning rate of biases.", 1.0)
    layer_decay: UpTo1 | None = key("Factor on the learning rate per layer from the head down; null is off.", None)
    fused: Literal["auto"] | bool = key("Update all weights at once; auto: not if 16-mixed clips gradients.", "auto")


class SchedulerConfig(OpenGroup):
    """The schedule (conf/scheduler): a curve by `name`, or a class by `_target_`, which gets all keys but ours."""

    name: Literal["constant", "cosine", "linear", "multistep", "plateau", "step", "wsd"] = key("The schedule.", None)
    target: Text = key("A class of torch, timm or your own, instead of a name.", None, alias="_target_")
    interval: Literal["epoch", "step"] = key("_target_: how often it steps, and the unit of its lengths.", "epoch")
    unit: Literal["epoch", "step"] = key("Unit of all lengths of the schedule; a step is an optimizer step.", "epoch")
    warmup: NotNegative = key("Length of the linear warm-up.", 0)
    min_factor: Fraction = key("cosine, linear: final fraction of the learning rate.", 0.0)
    step_size: Positive = key("step: length between two drops.", 30)
    milestones: Annotated[Numbers, MILESTONES] = key("multistep: when to multiply by gamma.", [30, 60, 80])
    gamma: UpTo1 = key("step, multistep: factor of each drop.", 0.1)
    factor: Inside01 = key("plateau: factor of each drop.", 0.1)
    patience: Whole = key("plateau: epochs without improvement before a drop.", 5)
    min_lr: NotNegative = key("plateau: smallest learning rate.", 0.0)
    monitor: Metric | None = key("plateau, or a _target_ like it: metric that must improve.", None)
    decay_fraction: UpTo1 = key("wsd: fraction of the run in which the learning rate falls.", 0.2)

    @model_validator(mode="wrap")
    @classmethod
    def _pass_on(cls, node: Any, validate: Callable[[Any], Any]) -> Any:
        """Accept any value of any key but ours next to a `_target_`."""
        if not isinstance(node, dict) or "_target_" not in node:
            return validate(node)
        ours = ("_target_", "interval", "monitor")
        config = validate({name: value for name, value in node.items() if name in ours})
        config.__pydantic_extra__.update({name: value for name, value in node.items() if name not in ours})
        return config


class TrainerConfig(Group):
    """Devices, precision and limits (conf/trainer): keys of our own, and arguments of Lightning's Trainer."""

    accelerator: Accelerator = key("Kind of device.", "auto")
    devices: Devices = key("How many, or which GPUs, as [0, 2]; auto: all GPUs, or one CPU process.", "auto")
    num_nodes: Count = key("Machines; more than one needs a launcher such as torchrun or srun.", 1)
    strategy: Literal["auto", "ddp", "fsdp"] = key("Strategy; auto: ddp for several devices.", "auto")
    precision: Precision = key("auto: bf16-mixed if the device is fast at it, 16-mixed on older GPUs, else 32.", "auto")
    max_epochs: Count | None = key("Epochs; null is no limit.", 10)
    min_epochs: Count | None = key("Epochs before early stopping may stop the run.", None)
    max_steps: Steps = key("Optimizer steps; -1 is no limit.", -1)
    min_steps: Count | None = key("Optimizer steps before early stopping may stop the run.", None)
    max_time: MaxTime | None = key('Limit of time, as "DAYS:HOURS:MINUTES:SECONDS".', None)
    accumulate_grad_batches: Count = key("Batches per optimizer step.", 1)
    gradient_clip_val: Positive | None = key("Clip gradients to this norm; null does not clip.", None)
    gradient_clip_algorithm: Literal["norm", "value"] | None = key("Clip by norm or by value; null is norm.", None)
    limit_train_batches: SomeBatches | None = key("Fraction (0.5) or number (5) of training batches per epoch.", None)
    limit_val_batches: Batches | None = key("Fraction or number of validation batches.", None)
    limit_test_batches: Batches | None = key("Fraction or number of test batches.", None)
    overfit_batches: Batches = key("Use only this fraction or number of training batches; 0.0 is off.", 0.0)
    log_every_n_steps: Count = key("Optimizer steps between two points of the step curves.", 20)
    check_val_every_n_epoch: Count = key("Epochs between validations.", 1)
    val_check_interval: SomeBatches | None = key("Validate also after this fraction or number of batches.", None)
    num_sanity_val_steps: Annotated[int, Ge(-1)] = key("Validation batches to try before training; -1 is all.", 0)
    detect_anomaly: bool = key("Let autograd look for NaN, which is slow.", False)
    profiler: Literal["simple", "advanced", "pytorch"] | None = key("Lightning's profiler.", None)
    deterministic: bool | Literal["warn"] = key("Use deterministic algorithms only.", False)
    inference_mode: bool = key("Evaluate in torch.inference_mode instead of torch.no_grad.", True)
    sync_batchnorm: bool = key("Compute BatchNorm's statistics over all devices.", False)
    channels_last: Literal["auto"] | bool = key("Memory format channels_last; auto is on for GPUs.", "auto")
    tf32: bool = key("Allow TF32 on GPUs.", True)
    cudnn_benchmark: bool = key("Let cuDNN measure its algorithms once on GPUs.", True)
    timeout: Positive = key("Minutes that ranks wait for each other.", 10)
    grad_compression: Literal["bf16"] | None = key("Exchange gradients in bf16; null: as they are.", None)
    master_port: Annotated[int, Ge(1), Le(65535)] | None = key("Port at which ranks meet; null takes a free one.", None)
    lr_find: bool = key("Print the loss at rising learning rates, and a rate to try first, before the run.", False)
    batch_size_find: bool = key("Print the largest batch that fits on a GPU, before the run.", False)


# Keys of `trainer` that Lightning's Trainer does not get; it gets all remaining keys as they are.
OWN_TRAINER_KEYS: tuple[str, ...] = ("strategy", "precision", "channels_last", "tf32", "cudnn_benchmark", "timeout")
OWN_TRAINER_KEYS += ("master_port", "grad_compression", "lr_find", "batch_size_find")


class WandbConfig(Group):
    mode: Literal["auto", "online", "offline", "disabled"] = key("auto: online with an API key, else offline.", "auto")
    project: Text = key("Project of the run.", "alexlab")
    entity: Text | None = key("User or team; null is your default.", None)
    name: Label | None = key("Name of the run; null names it after what the command line changed.", None)
    group: Label | None = key("Group of the run; null: the sweep, or the runs that differ only in the seed.", None)
    tags: list[Tag] = key("Tags; none are the network, the data and the recipe.", [])
    notes: Text | None = key("Notes on the run.", None)
    log_model: bool = key("Upload the best checkpoint as an artifact.", False)
    log_code: bool = key("Upload the commit and a patch of local changes as an artifact.", True)
    init_timeout: Positive = key("Seconds that the server may take to answer before the run continues offline.", 8)


class TensorBoardConfig(Group):
    """TensorBoard event files in the run directory (logger=tensorboard)."""


class MlflowConfig(Group):
    """MLflow (logger=mlflow)."""

    tracking_uri: Text | None = key("Server or file; null: MLFLOW_TRACKING_URI, or mlflow.db in paths.logs.", None)
    experiment_name: Text = key("Experiment that the run belongs to.", "alexlab")
    run_name: Text | None = key("Name of the run; null names it after what the command line changed.", None)


class LoggerConfig(GroupOfTargets):
    """Loggers (conf/logger). Any other logger is a further entry, which must have a `_target_`."""

    wandb: WandbConfig | None = key("Weights & Biases; null is off.", None)
    tensorboard: TensorBoardConfig | None = key("TensorBoard; null is off.", None)
    mlflow: MlflowConfig | None = key("MLflow; null is off.", None)


class CallbacksConfig(GroupOfTargets):
    """Callbacks (conf/callbacks). A callback of your own is a further entry, which must have a `_target_`."""

    progress: Literal["auto", "rich", "plain", "none"] = key("auto: rich in a terminal, else plain.", "auto")
    lr_monitor: bool = key("Log learning rates.", True)
    figures: bool = key("Save figures of the trained network in figures/, and log them.", True)
    model_summary: Whole = key("Depth of the table of layers; 0 is off.", 0)
    device_stats: bool = key("Log statistics of the devices.", False)
    grad_norm: bool = key("Log train/grad_norm of all weights, before clipping.", False)
    early_stopping: Count | None = key("Stop after this many validations without improvement; null does not.", None)


class TaskConfig(OpenGroup):
    """The LightningModule (conf/task)."""

    target: Text = key("The class.", "alexlab.tasks.classification.ImageClassifier", alias="_target_")


class LossConfig(OpenGroup):
    """The loss (conf/loss): a module from logits and targets to the mean of the batch."""

    target: Text = key("The class.", "alexlab.tasks.losses.CrossEntropy", alias="_target_")


class MetricsConfig(GroupOfTargets):
    """Metrics of torchmetrics by name (conf/metrics), each with a `_target_`, besides the loss and the accuracies."""

    report: bool = key("Run python eval.py at the end of the training, which writes report.html.", False)


class EmaConfig(Group):
    decay: Inside01 | None = key("Decay of the moving average of the weights, such as 0.9999; null is off.", None)


class FinetuneConfig(Group):
    freeze_epochs: Whole = key("First epochs, in which only the head is trained.", 0)
    backbone_lr_factor: Positive = key("Factor on the learning rate of all layers but the head.", 1.0)


class ResumeConfig(Group):
    run: LocalPath | None = key("Directory, name, latest, or auto: the run in hydra.run.dir, if any.", None)
    allow_changes: bool = key("Accept settings that differ from the run's.", False)
    break_lock: bool = key("Take over the directory from another machine, which no longer trains.", False)
    requeue: bool = key("On SLURM with resume=auto: requeue the job after SIGUSR1, or if a rank is lost.", False)


class CheckpointConfig(Group):
    every_n_steps: Count | None = key("Optimizer steps between checkpoints; null is off.", None)
    every_minutes: Positive | None = key("Minutes between checkpoints; null is off.", 15)
    keep: Literal["best", "last", "all"] = key(
        "What a finished run keeps: best.ckpt alone; or last.ckpt too; or all.", "last"
    )


class SweepConfig(Group):
    keep_going: bool = key("Record a failed job and start the next one.", False)
    pruner: Literal["median", "hyperband", "none"] = key("Optuna: how to stop bad trials early.", "none")
    startup_trials: Whole = key("Optuna, median: first trials that are never stopped.", 5)
    warmup_epochs: Whole = key("Optuna: first epochs in which no trial is stopped.", 2)


class PathsConfig(Group):
    data: LocalFolder = key("Folder of the data sets.")
    logs: Logs = key("Folder of the runs, or s3://BUCKET/PATH.")
    scratch: LocalFolder = key(
        "Folder of this machine, where the runs of a bucket are written first.", str(ROOT / "logs")
    )

    @property
    def local(self) -> Path:
        """The folder of this machine that has the runs."""
        return Path(local_logs(self.logs, self.scratch)).absolute()


# -- The commands


class CommandConfig(Group):
    command: Text = key("The command; the folder below paths.logs has the same name.")
    paths: PathsConfig = key("Folders that are read and written.", option="default")
    run_dir: Text = key("Filled in: the run directory.", "")
    overrides: list[str] = key("Filled in: the overrides of the command line.", [])


class TrainConfig(CommandConfig):
    """alexlab train"""

    model: ModelConfig = key("The network.", option="alexnet")
    data: DataConfig = key("The images.", option="folder")
    augment: AugmentConfig = key("Augmentation of training images.", option="basic")
    task: TaskConfig = key("What is learned.", TaskConfig)
    loss: LossConfig = key("The loss.", LossConfig)
    metrics: MetricsConfig = key("Metrics besides the loss and the accuracies.", MetricsConfig)
    optimizer: OptimizerConfig = key("The optimizer.", option="sgd")
    scheduler: SchedulerConfig = key("The learning-rate schedule.", option="cosine")
    trainer: TrainerConfig = key("Devices, precision and limits.", option="auto")
    logger: LoggerConfig = key("Loggers.", option="csv")
    callbacks: CallbacksConfig = key("Callbacks.", option="default")
    sweep: SweepConfig = key("How -m treats jobs.", SweepConfig)
    seed: Seed = key("Seed of split, order, augmentation, weights and dropout.", 0)
    label_smoothing: Below1 = key("Label smoothing of loss=cross_entropy, in training only.", 0.0)
    compile: bool = key("Compile the network with torch.compile.", False)
    ema: EmaConfig = key("Moving average of the weights.", EmaConfig)
    finetune: FinetuneConfig = key("Training from trained weights.", FinetuneConfig)
    monitor: Metric = key("Metric that selects best.ckpt, and that a sweep optimizes.", "val/acc1")
    monitor_mode: Literal["min", "max"] | None = key("Whether less or more is better; null: as the metric says.", None)
    on_nan: Literal["stop", "skip"] = key("If the loss is NaN or infinite: stop the run, or skip the step.", "stop")
    test: bool = key("Test the best checkpoint at the end (on val if there is no test/).", True)
    resume: ResumeConfig = key("resume=RUN resumes a run in the same directory, with the same config.", ResumeConfig)
    checkpoint: CheckpointConfig = key("When last.ckpt is written.", CheckpointConfig)
    ckpt_path: LocalPath | None = key("Run, latest, or last.ckpt to continue in a new run.", None)
    init_from: Weights | None = key(
        "Run, file, hub:USER/NAME or wandb:ENTITY/PROJECT/ARTIFACT whose weights to start from.", None
    )
    from_run: LocalPath | None = key("Run, or latest, to train again with the same config and seed.", None)
    from_wandb: Annotated[str, WANDB_RUN] | None = key("Run in W&B to train again: ENTITY/PROJECT/RUN.", None)
    dry_run: bool = key("Print what would run, and stop.", False)
    allow: list[Text] = key("Packages that the config of a run may name, besides alexlab.", [])
    my: dict[Any, Any] = key("Your own keys: any content.", {})
    repeats: Text | None = key("Filled in: the run of from_run or from_wandb.", None)
    choices: dict[str, Any] = key("Filled in: the option of each group.", {})


class BenchmarkConfig(TrainConfig):
    """alexlab benchmark"""

    seconds: Positive = key("Duration of each of the four measurements, in seconds.", 10)
    format: Literal["table", "json"] = key("json: one JSON object on standard output.", "table")


class RunDataConfig(Group):
    root: Text | None = key("Another folder of images with the same classes; null is the run's.", None)
    num_workers: Whole | None = key("Decoding threads; null takes the run's.", None)
    on_error: Literal["raise", "skip"] | None = key("Broken images; null takes the run's.", None)


class RunTrainerConfig(Group):
    accelerator: Accelerator | None = key("Kind of device; null takes the run's.", None)
    precision: Precision | None = key("Precision; null takes the run's.", None)


class RunConfig(CommandConfig):
    allow: list[Text] = key("Packages that the run's config may name, besides alexlab.", [])
    run: LocalPath = key("Run: directory, name, or latest.", give="a run's directory with run=PATH, or run=latest")
    ckpt: LocalPath = key("Checkpoint: best, last, or a file.", "best")


class EvaluatingConfig(RunConfig):
    data: RunDataConfig = key("The images.", RunDataConfig)
    compile: bool | None = key("torch.compile; null takes the run's, which reproduces its metrics exactly.", None)
    trainer: RunTrainerConfig = key("Device and precision.", RunTrainerConfig)


class EvalConfig(EvaluatingConfig):
    """alexlab eval"""

    split: Literal["val", "test"] | None = key("val or test; null: test, or val if the images have no test.", None)
    crops: Annotated[int, Rule("1, 2 or 10", lambda v: v in (1, 2, 10))] = key(
        "Crops per image: 1 (center), 2 (mirrored too), or the paper's 10 (averaged).", 1
    )
    against: Text | None = key("Another run, tested on the same images and compared by McNemar's test.", None)
    report: bool = key("Calibrate the probabilities on val, and write report.html: curves, classes, mistakes.", True)


class PredictConfig(RunConfig):
    """alexlab predict"""

    images: Text = key("An image, a folder, or a quoted glob.", give="an image, a folder or a glob with images=PATH")
    topk: Count = key("Classes per image.", 5)
    calibrated: bool = key("Use the temperature that python eval.py has fitted on val.", False)
    out: Text | None = key("CSV file; null is predictions.csv in the run directory.", None)
    batch_size: Count = key("Images per batch.", 64)
    num_workers: Whole | None = key("Decoding threads; null takes the available cores.", None)


class FiguresConfig(EvaluatingConfig):
    """alexlab figures"""

    among: Whole = key("Training images among which nearest neighbours are searched; 0 draws none.", 2000)
    format: Literal["png", "svg", "pdf"] = key("svg and pdf are for a paper: at most 7 inches wide.", "png")
    cam: Text | None = key("An image, a folder or a quoted glob: draw only the Grad-CAM of these images.", None)


class ExportConfig(RunConfig):
    """alexlab export"""

    format: Literal["onnx", "torch_export", "hub"] = key(
        "torch_export is for torch.export.load, hub a folder for the Hugging Face hub.",
        give="format=onnx, format=torch_export or format=hub",
    )
    out: Text | None = key("File or folder; null is model.onnx, model.pt2 or hub/ in the run directory.", None)
    images: Text | None = key("onnx, torch_export: images to check the file on; null is test/ or val/.", None)
    tolerance: Positive = key("Largest difference of a logit from the run's; above it no file is written.", 1e-4)


class PrepareConfig(CommandConfig):
    """alexlab prepare"""

    seed: Seed = key("Seed of the split by fractions, as in training.", 0)
    data: DataConfig = key("The images.", option="folder")
    out: Text | None = key("New folder, or the folder of a preparation that was stopped.", None)
    stats: bool = key("Print mean and std of the training images.", False)
    format: Literal["jpeg", "raw"] = key("raw: pixels, which need no decoding.", "jpeg")
    short_side: Pixels = key("Short side in pixels; smaller images keep their size.", 256)
    square: bool = key("Store the center square only.", False)
    quality: Annotated[int, Ge(1), Le(100)] = key("JPEG quality.", 90)
    shard_mb: Positive = key("Size of a file in MB.", 512)
    num_workers: Count | None = key("Threads; null takes the available cores.", None)


class CompareConfig(CommandConfig):
    """alexlab compare"""

    runs: Text | Annotated[list[Text], Rule("a list that is not empty", bool)] = key("Folder, glob, or a list of them.")
    where: Text | None = key('Condition on runs, such as where="optimizer.lr>0.01 and status=finished".', None)
    sort: Text | None = key("Metric or setting to sort by; null is val/acc1.", None)
    seeds: Literal["group", "each"] = key("group: a row of mean±std over seeds; each: a row per run.", "group")
    format: Literal["table", "markdown", "csv", "json", "html"] = key("Output; html is a page with curves.", "table")
    out: Text | None = key("File; null is the terminal, and logs/compare.html for html.", None)
    most: Count | None = key("Rows; null is 30 in a table, 200 on a page, else all.", None)
    equal: bool = key("Report whether two runs are equal step by step; exit with 1 if they are not.", False)


class CleanConfig(CommandConfig):
    """alexlab clean"""

    runs: Text | Annotated[list[Text], Rule("a list that is not empty", bool)] = key("Folder, glob, or a list of them.")
    where: Text | None = key('Condition on runs, such as where="val/acc1<0.5".', None)
    keep: Literal["best", "last"] = key("best.ckpt alone, so that no run can be resumed; or last.ckpt too.", "last")
    dry_run: bool = key("Only print what would be deleted.", True)


class DoctorConfig(CommandConfig):
    """alexlab doctor"""

    trainer: TrainerConfig = key("Devices and precision, as for a training.", option="auto")


class LayoutConfig(Group):
    max_runs: Count = key("Newest runs that a panel shows.", 100)
    sections: Annotated[Plain, Rule("sections by name, each with panels", bool)] = key("Panels by section.")


class DashboardConfig(CommandConfig):
    """alexlab dashboard"""

    entity: Name | None = key("User or team; null is your default.", None)
    project: Name = key("Project.", "alexlab")
    name: Text = key("Name of the view.", "alexlab")
    dry_run: bool = key("Print what would be saved, without asking a server.", False)
    metric: Text = key("Value of a run's summary for bars, sweeps and scatter plots.", "val/acc1_best")
    x: Text = key("x axis of line plots.", "trainer/global_step")
    swept: Annotated[list[Text], Rule("a list of settings, such as [optimizer.lr]", bool)] = key("Settings of sweeps.")
    timeout: Count = key("Seconds that the server may take to answer.", 8)
    dashboard: LayoutConfig = key("Sections and panels.", option="default")


class StudyConfig(Group):
    """hydra.sweeper of a study (conf/hydra/sweeper/optuna.yaml)"""

    study_name: Text = key("Name of the study, and of the folder of its jobs.")
    storage: Text | None = key("Address of the database; null keeps the study in memory.")
    direction: Literal["minimize", "maximize"] = key("Whether less or more of monitor is better.")
    n_trials: Count = key("Trials in the whole study that are complete or pruned.")
    sampler: dict[str, Any] = key("Optuna's sampler.")


def mode_of(metric: str) -> Literal["min", "max"]:
    """Return "min" for a metric whose lower value is better, such as a loss, else "max"."""
    return "min" if lower_is_better(metric) else "max"


# Keys that are texts, but are Hydra's or an argument of a class; and what they take, see `takes_text`.
TEXT, OR_NULL, TEXTS = set[type]({str}), set[type]({str, type(None)}), set[type]({list, type(None)})
OTHER_TEXTS = {f"hydra.{key}": TEXT for key in ("run.dir", "sweep.dir", "sweep.subdir", "job.name")}
OTHER_TEXTS |= {"hydra.sweeper.study_name": TEXT, "hydra.sweeper.storage": OR_NULL, "data.separator": TEXT}
OTHER_TEXTS |= {"data.file": TEXT, "data.path": TEXT, "data.subset": OR_NULL, "task.teacher": OR_NULL}
OTHER_TEXTS |= {f"data.columns.{k}": OR_NULL for k in ("path", "label", "split", "fold", "group", "weight", "image")}
OTHER_TEXTS |= {"data.classes": TEXTS, "data.columns.labels": TEXTS}


# -- For --help


def describe(model: type[Group], above: str = "") -> dict[str, str]:
    """Return the description of each key and group by dotted name (after `above`), with the options of the key."""
    descriptions: dict[str, str] = {}
    for name, field in fields_of(model).items():
        options = _options(field.annotation)
        text = field.description or ""
        descriptions[above + name] = f"{text.removesuffix('.')} ({', '.join(options)})." if len(options) > 1 else text
        if group := group_in(field):
            descriptions |= describe(group, f"{above}{name}.")
    return descriptions


def _options(annotation: Any) -> list[str]:
    """List the options in the type of a key: auto and ddp for `Literal["auto", "ddp"] | None`."""
    if get_origin(annotation) is Literal:
        return list(map(str, get_args(annotation)))
    return [option for part in get_args(annotation) for option in _options(part)]


def takes_text(annotation: Any) -> set[type]:
    """Return {str} for a key of text, with NoneType and list if it takes null and a list; else an empty set."""
    if get_origin(annotation) is Annotated:
        return takes_text(get_args(annotation)[0])
    if get_origin(annotation) is list:
        return {list} if takes_text(get_args(annotation)[0]) == {str} else set()
    if annotation in (str, type(None)):
        return {annotation}
    kinds = [takes_text(part) for part in get_args(annotation)] if get_origin(annotation) in (Union, UnionType) else []
    return set().union(*kinds) if all(kinds) else set()


def fields_of(model: type[Group]) -> dict[str, FieldInfo]:
    """Return the fields of a model by their names in yaml."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def group_in(field: FieldInfo) -> type[Group] | None:
    """Return the model that a field holds; None for a field with a plain value."""
    options = (field.annotation, *get_args(field.annotation))
    return next((option for option in options if isinstance(option, type) and issubclass(option, Group)), None)
