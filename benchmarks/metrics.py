"""Loss, top-1 and top-5 accuracy of a batch: our one metric, and three of torchmetrics.

python benchmarks/metrics.py [--batch 64] [--classes 10 1000] [--updates 300] [--rounds 9]      On one CPU thread.

Both update in turn with the same random logits. The script prints medians in microseconds per update, and their ratio.
"""

import statistics
import time
from collections.abc import Callable

import torch
from common import about, in_turn, options
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from alexlab.tasks.metrics import LossAndAccuracy


def compare(classes: int, batch: int, updates: int, rounds: int) -> dict[str, float]:
    """Return the median microseconds per update of each."""
    logits, labels, loss = torch.randn(batch, classes), torch.randint(classes, (batch,)), torch.tensor(1.0)
    ours, mean = LossAndAccuracy(), MeanMetric()
    top1, top5 = (MulticlassAccuracy(classes, top_k=k, average="micro", validate_args=False) for k in (1, 5))

    def one() -> None:
        ours.add(logits, labels, loss)

    def three() -> None:
        mean.update(loss)
        top1.update(logits, labels)
        top5.update(logits, labels)

    def timed(update: Callable[[], None]) -> float:
        start = time.perf_counter()
        for _ in range(updates):
            update()
        return (time.perf_counter() - start) / updates * 1e6

    measures = {"torchmetrics": lambda: timed(three), "ours": lambda: timed(one)}
    return {name: statistics.median(each) for name, each in in_turn(rounds, measures, warm_up=True).items()}


def main() -> None:
    args = options(__doc__, batch=64, classes=[10, 1000], updates=300, rounds=9)
    torch.set_num_threads(1)
    for classes in args.classes:
        three, one = compare(classes, args.batch, args.updates, args.rounds).values()
        print(f"{classes} classes: torchmetrics {three:.0f} us, ours {one:.0f} us, {three / one:.1f} times as long")
    print(about("torch", "torchmetrics", batch=args.batch, updates=args.updates, rounds=args.rounds))


if __name__ == "__main__":
    main()
