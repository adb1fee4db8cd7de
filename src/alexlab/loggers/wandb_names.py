"""The names under which a run logs to W&B. A test compares them with what a run really logs."""

HISTORY = frozenset({
    "train/loss", "train/acc1", "train/acc5", "train/loss_step", "train/acc1_step", "train/grad_norm",
    "val/loss", "val/acc1", "val/acc5", "val/loss_best", "val/acc1_best", "val/acc5_best",
    "test/loss", "test/acc1", "test/acc5",
    "perf/images_per_second", "perf/images_per_second_step", "perf/data_wait", "perf/images", "perf/seconds",
    "trainer/global_step", "epoch", "_step", "_runtime", "_timestamp",
})  # fmt: skip
# of the groups of weights that an optimizer has: optim.py names them
RATES = frozenset(
    {"lr", "lr-warmup"}  # the latter of scheduler=plateau: the same rates once more
    | {f"{name}/{group}{bias}{slow}" for name in ("lr", "lr-warmup") for group in ("decay", "no_decay")
       for bias in ("", "_bias") for slow in ("", "_backbone")}
)  # fmt: skip
MEDIA = frozenset({
    "images/train", "figures/filters", "figures/curves", "figures/top5", "figures/neighbours",
    "figures/confusion_matrix", "figures/per_class", "figures/mistakes",
})  # fmt: skip

# numbers and texts of a run's summary, which has the last value of each of HISTORY as well
FACTS = frozenset({
    "status", "seconds", "parameters", "images_per_second", "data_wait", "world_size", "effective_lr",
    "steps_per_epoch", "best_epoch", "precision", "macs", "gpu_hours", "epochs", "steps",
})  # fmt: skip
