"""init_from: the weights of a W&B artifact, and of files that hold weights alone."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command, config_of, summary_of, tiny_train
from safetensors.torch import save_file
from wandb_server import WandbServer

from alexlab.engine.errors import UserError
from alexlab.models.pretrained import torchvision_net
from alexlab.tasks.load import load_initial_weights

CLASSES = [str(number) for number in range(10)]
STILL = ("optimizer.lr=1e-9", "optimizer.weight_decay=0", "test=false")


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint that training changes, without "net."."""
    state = torch.load(path, weights_only=True)["state_dict"]
    return {key.removeprefix("net."): value for key, value in state.items() if key.endswith((".weight", ".bias"))}


def assert_starts_from(state: dict[str, torch.Tensor], run_dir: Path, new: set[str] | None = None) -> None:
    now = weights(run_dir / "checkpoints/best.ckpt")
    assert len(now) > 50
    for key, value in now.items():
        same = value.shape == state[key].shape and torch.allclose(value, state[key], atol=1e-6)
        assert same == (key not in (new or set())), key


# -- W&B


@pytest.fixture(scope="module")
def uploaded(server: WandbServer, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best checkpoint is an artifact on the server."""
    run_dir = tmp_path_factory.mktemp("logs") / "uploaded"
    words = ["logger=wandb", "logger.wandb.log_model=true", "optimizer.lr=0.05"]
    done = tiny_train(shapes, run_dir, *words, env=server.env())
    assert done.returncode == 0, done.stderr
    return run_dir


def test_a_run_starts_from_the_checkpoint_of_an_artifact(
    server: WandbServer, uploaded: Path, shapes: Path, tmp_path: Path
) -> None:
    name, best = f"model-{server.run_of('uploaded').name}", uploaded / "checkpoints/best.ckpt"
    folder = tmp_path / f"logs/.artifacts/tester/alexlab/{name}-v0/checkpoints"
    for run, alias in (("first", ""), ("second", ":v0")):
        before = server.calls.count("ArtifactMembershipByName"), len(server.downloads)
        words = [f"init_from=wandb:tester/alexlab/{name}{alias}", f"paths.logs={tmp_path}/logs", *STILL]
        done = tiny_train(shapes, tmp_path / run, *words, env=server.env())
        assert done.returncode == 0, done.stderr
        assert f"initial weights: {folder}/best.ckpt\n" in done.stdout
        assert_starts_from(weights(best), tmp_path / run)
        assert server.calls.count("ArtifactMembershipByName") == before[0] + 1, "an alias may have moved"
        assert server.downloads[before[1] :].count("best.ckpt") == (run == "first"), "the file is there already"
    assert (folder / "best.ckpt").read_bytes() == best.read_bytes()
    assert [path.name for path in folder.iterdir()] == ["best.ckpt"]
    done = command("train.py", f"resume={tmp_path / 'first'}", "trainer.max_epochs=2")  # needs no server
    assert done.returncode == 0, done.stderr
    assert {line.partition(":")[0] for line in server.unknown} <= {"ServerFeaturesQuery"}


@pytest.mark.parametrize(
    ("named", "env", "message"),
    [
        ("tester/alexlab/none", {}, r"the server did not return that artifact (artifact membership 'none:latest' not"),
        ("tester/alexlab/{name}:v7", {}, "v7' not found in 'tester/alexlab'): check the name, which is part of the"),
        ("tester/alexlab/alexlab-code", {}, "has no best.ckpt and not one single file of weights (.ckpt, .pth, .pt, "),
        ("tester/alexlab/{name}", {"WANDB_API_KEY": ""}, "needs an API key: run `wandb login` or set WANDB_API_KEY."),
        ("tester/alexlab/{name}", {"WANDB_BASE_URL": "http://127.0.0.1:9"}, "the server did not answer or refused the"),
        (
            "a/../x",
            {},
            "must be a run, a file, a folder of format=hub, hub:USER/NAME, or wandb:ENTITY/PROJECT/ARTIFACT, with",
        ),
    ],
)
def test_an_artifact_that_cannot_be_used_is_one_error_before_the_run(
    named: str, env: dict[str, str], message: str, server: WandbServer, uploaded: Path, shapes: Path, tmp_path: Path
) -> None:
    named = "init_from=wandb:" + named.format(name=f"model-{server.run_of('uploaded').name}")
    words = [named, f"paths.logs={tmp_path}/logs"]
    done = tiny_train(shapes, tmp_path / "x", *words, env={**server.env(), **env})
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert f"error: `{named}`" in done.stderr
    assert message in done.stderr
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.rglob("*.ckpt"))


def test_an_artifact_that_may_not_be_read_is_one_error(
    server: WandbServer, uploaded: Path, shapes: Path, tmp_path: Path
) -> None:
    server.refuses["ArtifactMembershipByName"] = "permission denied"
    try:
        done = tiny_train(shapes, tmp_path / "x", "init_from=wandb:tester/alexlab/secret", env=server.env())
    finally:
        server.refuses.clear()
    assert done.returncode == 2
    assert "the server did not return that artifact (" in done.stderr
    assert "permission denied" in done.stderr
    assert not (tmp_path / "x").exists()


# -- files of weights alone


SAVE: dict[str, Callable[[dict[str, torch.Tensor], Path], Any]] = {
    "plain.pth": torch.save,
    "legacy.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "nested.pt": lambda state, path: torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, path),
    "lightnings.ckpt": lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path),
    "tensors.safetensors": save_file,
}


@pytest.mark.parametrize("name", SAVE)
def test_a_network_starts_from_a_state_dict(name: str, tmp_path: Path) -> None:
    state = torchvision_net("shufflenet_v2_x0_5", 10).state_dict()
    SAVE[name](state, tmp_path / name)
    net = torchvision_net("shufflenet_v2_x0_5", 10)
    assert load_initial_weights(net, tmp_path / name, CLASSES, config_of()) is False
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_a_run_starts_from_a_state_dict_without_its_head(shapes: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = torchvision_net("shufflenet_v2_x0_5", 1000).state_dict()
    torch.save(state, tmp_path / "plain.pth")
    done = tiny_train(shapes, tmp_path / "run", f"init_from={tmp_path}/plain.pth", *STILL)
    assert done.returncode == 0, done.stderr
    head = "; the last layer is new, because the classes differ"
    assert f"initial weights: {tmp_path}/plain.pth{head}\n" in done.stdout
    assert_starts_from(state, tmp_path / "run", {"fc.weight", "fc.bias"})
    assert summary_of(tmp_path / "run")["status"] == "finished"


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (str(self.path),)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    torch.save(torchvision_net("shufflenet_v2_x1_0", 10).state_dict(), tmp_path / "other.pth")
    torch.save({"weights": 3}, tmp_path / "number.pth")
    torch.save({"conv1.weight": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    (tmp_path / "text.safetensors").write_text("no")
    for name, message in (
        ("other.pth", "the weights are another network's: stage2.0.branch1.2.weight, stage2.0.branch1.3.weight, stage"),
        ("number.pth", "is neither a checkpoint of this project nor a state dict: give a file of weights."),
        ("evil.pth", "cannot be read as a checkpoint (UnpicklingError: "),
        ("text.safetensors", "cannot be read as a checkpoint (SafetensorError: "),
        ("none.pth", "is not a file: give a checkpoint"),
    ):
        net = torchvision_net("shufflenet_v2_x0_5", 10)
        with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / name))}.*{re.escape(message)}"):
            load_initial_weights(net, tmp_path / name, CLASSES, config_of())
    assert not (tmp_path / "ran").exists()
