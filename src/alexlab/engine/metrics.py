"""What follows from the name of a metric: whether a lower value is better, and whether it says anything."""

import re
from collections.abc import Iterable

LOW_IS_GOOD = re.compile(
    r"loss(?!less|y|i)|error|perplexity"
    r"|(^|[/._-])(err|ppl|m[as]e|rmse|wer|cer)\d*($|[/._-])"
    r"|(^|/)(seconds|data_wait|parameters|macs|gpu_hours)$",
    re.IGNORECASE,
)


def lower_is_better(name: str) -> bool:
    """Return whether lower values of this metric are better. For names that do not match, higher is better."""
    return LOW_IS_GOOD.search(name) is not None


def is_always_one(name: str, values: Iterable[float | None], num_classes: int | None = None) -> bool:
    """Return whether this is a top-5 accuracy that is always 1, as with five classes or fewer."""
    is_top5 = re.search(r"(^|/)acc5(_step|_10crops)?$", name) is not None and (num_classes or 5) <= 5
    return is_top5 and all(value in (1, None) for value in values)
