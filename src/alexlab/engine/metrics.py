"""Decide by the name of a metric whether a lower value is better, as for "val/loss" and "val/mae"."""

import re

LOW_IS_GOOD = re.compile(
    r"loss(?!less|y|i)|error|perplexity"
    r"|(^|[/._-])(err|ppl|m[as]e|rmse|wer|cer)\d*($|[/._-])"
    r"|(^|/)(seconds|data_wait|parameters|macs|gpu_hours)$",
    re.IGNORECASE,
)


def lower_is_better(name: str) -> bool:
    """Return whether lower values of this metric are better. For names that do not match, higher is better."""
    return LOW_IS_GOOD.search(name) is not None
