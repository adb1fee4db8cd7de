"""The devices that a run uses, and its precision."""

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from alexlab.engine import launcher as launch
from alexlab.engine.errors import UserError


@dataclass(frozen=True)
class Devices:
    """What a run uses: kind ("cuda", "mps" or "cpu"), devices on this machine, machines."""

    kind: str
    local: int
    nodes: int

    @property
    def world_size(self) -> int:
        return self.local * self.nodes


def find_devices(config: DictConfig) -> Devices:
    """What `trainer.accelerator`, `devices` and `num_nodes` mean on this machine.

    Raises:
        UserError: they ask for what is not here.
    """
    asked, wanted = config.trainer.accelerator, config.trainer.devices
    gpus = torch.cuda.device_count()
    mps = torch.backends.mps.is_available()
    if asked == "auto":
        kind = "cuda" if gpus else "mps" if mps and config.trainer.strategy == "auto" else "cpu"
    else:
        kind = {"gpu": "cuda" if gpus or not mps else "mps"}.get(asked, asked)
    if kind == "cuda" and not gpus:
        raise UserError(
            f"trainer.accelerator={asked} needs a GPU, and torch {torch.__version__} sees none here: check nvidia-smi, "
            "or take the CPU with trainer.accelerator=cpu."
        )
    if kind == "mps" and not mps:
        raise UserError("trainer.accelerator=mps needs Apple's GPU, and there is none here: trainer.accelerator=cpu.")
    if config.trainer.strategy == "fsdp" and kind != "cuda":
        raise UserError("trainer.strategy=fsdp needs GPUs, and there are none here: trainer=ddp_cpu, or trainer=cpu.")
    available = {"cuda": gpus, "mps": 1}.get(kind)
    started = launch.world_of_launcher()
    if not isinstance(wanted, (int, str)) and kind != "cuda":
        raise UserError(
            f"trainer.devices={list(wanted)} names GPUs, and this run is on {kind}: give a number of devices."
        )
    if wanted == "auto":
        local = started[1] if started else available or 1
    else:
        local = wanted if isinstance(wanted, int) else len(wanted)
    if available is not None and local > available:
        raise UserError(f"trainer.devices={wanted}: this machine has {available}. Choose {available} or less, or auto.")
    nodes = config.trainer.num_nodes
    if started:
        nodes = started[0] // started[1] if nodes == 1 else nodes
        if local * nodes != started[0]:
            raise UserError(
                f"{started[0]} ranks were started, {started[1]} on this machine, and trainer.devices={wanted} with "
                f"trainer.num_nodes={config.trainer.num_nodes} makes {local * nodes}: leave both out, or start as many."
            )
    return Devices(kind, local, nodes)


def choose_precision(wanted: Any, kind: str) -> Any:
    """`trainer.precision`, or for auto what is fast there: bf16 from compute capability 8 on and on CPUs with bf16
    dot products, 16-mixed with loss scaling on older GPUs, else 32.

    Raises:
        UserError: 16-mixed on a CPU, where Lightning would take bf16-mixed unsaid.
    """
    if kind == "cpu" and wanted in ("16-mixed", 16):
        raise UserError(f"trainer.precision={wanted} needs a GPU; on a CPU take bf16-mixed, 32-true or auto.")
    if wanted != "auto":
        return wanted
    if kind == "cuda":
        return "bf16-mixed" if torch.cuda.get_device_capability()[0] >= 8 else "16-mixed"
    if kind == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16-mixed"
    return "32-true"
