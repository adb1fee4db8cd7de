"""Whether a lower value of a metric is the better one, by the metric's name: "val/loss", "val/mae", "test/acc1"."""

import re

LOW_IS_GOOD = re.compile(
    r"loss(?!less|y|i)|error|perplexity"
    r"|(^|[/._-])(err|ppl|m[as]e|rmse|wer|cer)\d*($|[/._-])"
    r"|(^|/)(seconds|data_wait|parameters|macs|gpu_hours)$",
    re.IGNORECASE,
)


def lower_is_better(name: str) -> bool:
    """Return whether lower values of this metric are better. A name that the rule does not know: higher is better."""
    return LOW_IS_GOOD.search(name) is not None
