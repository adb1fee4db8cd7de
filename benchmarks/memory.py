"""The time per step that keeping freed memory saves on a CPU: AlexNet with and without `keep_memory()`, in turn.

python benchmarks/memory.py [--rounds 5] [--image-size 64] [--batch 64]

Each candidate runs in a new process, because the setting cannot be undone. The first steps are not counted.
"""

import json
import resource
import statistics
import sys
import time
from functools import partial

from common import in_turn, options, run


def child(keep: bool, image_size: int, batch: int) -> None:
    import torch
    import torch.nn.functional as F

    from alexlab.engine.devices import choose_precision
    from alexlab.engine.memory import keep_memory
    from alexlab.models.alexnet import AlexNet

    if keep and not keep_memory():
        sys.exit("keep_memory() does nothing here: the C library is not glibc, or the environment has its settings")
    torch.manual_seed(0)
    net = AlexNet(10)
    optimizer = torch.optim.SGD(net.parameters(), 0.005, momentum=0.9, fused=True)
    images, targets = torch.randn(batch, 3, image_size, image_size), torch.randint(0, 10, (batch,))
    bf16 = choose_precision("auto", "cpu") == "bf16-mixed"
    seconds = []
    for _ in range(24):
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(net(images), targets)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"seconds": statistics.median(seconds[4:]), "peak_mb": peak, "loss": float(loss)}))


def main() -> None:
    args = options(__doc__, rounds=5, image_size=64, batch=64, child="")
    if args.child:
        child(args.child == "keep", args.image_size, args.batch)
        return

    def measure(name: str) -> dict[str, float]:
        words = [__file__, f"--child={name}", f"--image-size={args.image_size}", f"--batch={args.batch}"]
        return json.loads(run(words).splitlines()[-1])

    results_of = in_turn(args.rounds, {name: partial(measure, name) for name in ("plain", "keep")})
    losses = {result["loss"] for results in results_of.values() for result in results}
    assert len(losses) == 1, "the numbers must not change"
    medians = {name: statistics.median(r["seconds"] for r in results) for name, results in results_of.items()}
    ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(*results_of.values(), strict=True))
    for name, results in results_of.items():
        peak = statistics.median(r["peak_mb"] for r in results)
        rate = args.batch / medians[name]
        print(f"{name:6} {medians[name] * 1e3:.1f} ms per step, {rate:.0f} images/s, peak {peak:.0f} MB")
    print(f"plain / keep: {ratio:.2f}")


if __name__ == "__main__":
    main()
