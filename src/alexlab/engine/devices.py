"""Find the devices that a run uses, and choose the precision."""

from dataclasses import dataclass
from typing import Any

import torch

from alexlab.engine import launcher
from alexlab.engine.errors import UserError, counted


@dataclass(frozen=True)
class Devices:
    kind: str  # cuda, mps or cpu
    local: int  # devices on this machine
    nodes: int  # machines
    world: int | None = None  # ranks, if they were started already; machines may have different numbers of them

    @property
    def world_size(self) -> int:
        return self.world or self.local * self.nodes


def find_devices(settings: Any) -> Devices:
    """Return the devices that `settings` (the group `trainer`) select; UserError if this machine lacks them."""
    # which kind
    wanted = settings.devices
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if settings.accelerator == "auto":
        kind = "cuda" if gpus else "mps" if mps and settings.strategy == "auto" else "cpu"
    elif settings.accelerator == "gpu":
        kind = "cuda" if gpus or not mps else "mps"
    else:
        kind = settings.accelerator
    lacks_gpu = {"cuda": not gpus, "mps": not mps}.get(kind, False)
    if lacks_gpu or (settings.strategy == "fsdp" and kind != "cuda"):
        key = "accelerator" if lacks_gpu else "strategy"
        raise UserError(
            f"`trainer.{key}={getattr(settings, key)}` needs a GPU, and torch {torch.__version__} finds none: check "
            "nvidia-smi, or use trainer=cpu or trainer=ddp_cpu."
        )

    # how many
    available = {"cuda": gpus, "mps": 1}.get(kind)
    started = launcher.started()
    here = (started.local or started.world) if started else None
    if not isinstance(wanted, int | str) and kind != "cuda":
        raise UserError(
            f"`trainer.devices={list(wanted)}` names GPUs, and this run uses {kind}: give a number of devices."
        )
    if wanted == "auto":
        local = here or available or 1
    else:
        local = wanted if isinstance(wanted, int) else len(wanted)
    if available is not None and local > available:
        if started and local == here:
            raise UserError(
                f"{here} ranks were started on this machine, and this one finds {counted(available, 'GPU')}: each "
                f"rank must see all {here} GPUs, and uses one. On SLURM use --gpus-per-node={here} without "
                "--gpus-per-task and --gpu-bind; elsewhere, set CUDA_VISIBLE_DEVICES to the same list for all ranks."
            )
        raise UserError(
            f"`trainer.devices={wanted}`: this machine has {available}. Choose {available} or less, or auto."
        )
    if not started or here is None:
        return Devices(kind, local, settings.num_nodes)
    nodes = settings.num_nodes if settings.num_nodes > 1 else -(-started.world // here)
    if (wanted != "auto" or settings.num_nodes > 1) and local * nodes != started.world:
        raise UserError(
            f"{started.world} ranks were started, {here} on this machine, but `trainer.devices={wanted}` with "
            f"trainer.num_nodes={settings.num_nodes} makes {local * nodes}: remove both, or start as many."
        )
    return Devices(kind, local, nodes, started.world)


def choose_precision(wanted: Any, kind: str) -> Any:
    """Return `trainer.precision`; auto becomes the precision that is fast on the device.

    auto is bf16-mixed on GPUs of compute capability 8 or more and on CPUs with bf16 dot products, 16-mixed with loss
    scaling on older GPUs, else 32-true.

    Raises:
        UserError: 16-mixed on a CPU, where Lightning would silently use bf16-mixed.
    """
    if kind == "cpu" and wanted in ("16-mixed", 16):
        raise UserError(f"`trainer.precision={wanted}` needs a GPU: on a CPU use bf16-mixed, 32-true or auto.")
    if wanted != "auto":
        return wanted
    if kind == "cuda":
        return "bf16-mixed" if torch.cuda.get_device_capability()[0] >= 8 else "16-mixed"
    if kind == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16-mixed"
    return "32-true"
