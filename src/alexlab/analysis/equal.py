"""Whether two runs went the same way, number by number: for a change that must not change what is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from alexlab.analysis.runs import Row, Run
from alexlab.engine.errors import UserError

MEANS = ("train/loss_step", "train/acc1_step")  # of the steps since they were logged before


@dataclass
class Comparison:
    """
    Attributes:
        steps: at which both have logged a number of the same name.
        numbers: that were compared.
        alone: steps that one alone has logged, up to where the shorter one ends.
        unpaired: numbers that one alone has logged at the other steps, or that are means over steps of which the other
            has logged some apart.
        difference: the first, in words; None where all are equal.
        keys: of the numbers that were compared.
    """

    steps: int
    numbers: int
    alone: int
    unpaired: int
    difference: str | None
    keys: set[str] = field(default_factory=set)


def compared(a: Run, b: Run) -> Comparison:
    """All numbers that both have logged at a step: losses, accuracies, learning rates, gradients' norms. Not speed and
    time, and not the test, which follows from them.

    Raises:
        UserError: one has no numbers, or no step is logged in both.
    """
    for run in (a, b):
        if not run.rows:
            raise UserError(f"equal=true: {run.path} has no numbers to compare (its metrics.csv).")
    ones, others = _by_step(a.rows), _by_step(b.rows)
    both = sorted(step for step in ones.keys() & others.keys() if ones[step].keys() & others[step].keys())
    if not both:
        raise UserError(
            f"equal=true: no step is logged in both {a.name} and {b.name}: run them with the same "
            "trainer.log_every_n_steps."
        )
    last_one, last_other = _end(ones), _end(others)
    end = min(last_one, last_other)
    found = Comparison(len(both), 0, sum(step <= end for step in ones.keys() ^ others.keys()), 0, None)
    spans = {key: (_before(ones, key), _before(others, key)) for key in MEANS}
    for step in both:
        found.unpaired += len(ones[step].keys() ^ others[step].keys())
        for key in sorted(ones[step].keys() & others[step].keys()):
            if key in spans and spans[key][0].get(step) != spans[key][1].get(step):
                found.unpaired += 1
                continue
            one, other = ones[step][key], others[step][key]
            found.numbers += 1
            found.keys.add(key)
            if one != other and not (one != one and other != other):
                found.difference = f"{a.name} and {b.name} differ first at step {step}: {key} is {one!r} and {other!r}."
                return found
    if not any(key.startswith(("train/", "val/")) for key in found.keys):
        raise UserError(
            f"equal=true: no loss and no accuracy of {a.name} and {b.name} can be compared, as none is of the same "
            "steps: run them with the same trainer.log_every_n_steps."
        )
    if last_one != last_other:
        longer, shorter = (a, b) if last_one > last_other else (b, a)
        found.difference = (
            f"{shorter.name} ends at step {end}, and {longer.name} goes on to step {max(last_one, last_other)}; equal "
            "up to there."
        )
    return found


def _end(steps: dict[int, Row]) -> int:
    """The last that was trained: one more row may be of a validation at the end."""
    trained = [step for step, row in steps.items() if any(key.startswith("train/") for key in row)]
    return max(trained or steps)


def _before(steps: dict[int, Row], key: str) -> dict[int, int | None]:
    """For each step at which it was logged, the one before."""
    having = sorted(step for step, row in steps.items() if key in row)
    return dict(zip(having, [None, *having], strict=False))


def _by_step(rows: Sequence[Row]) -> dict[int, Row]:
    """All that was logged at a step, together: the rows of a resumed run may be divided otherwise."""
    found: dict[int, Row] = {}
    for row in rows:
        numbers = {key: value for key, value in row.items() if key.startswith(("train/", "val/", "lr"))}
        if any(not key.startswith("lr") for key in numbers):
            found.setdefault(int(row["step"]), {}).update(numbers)
    return found


def say_equal(runs: Sequence[Run]) -> bool:
    """Prints whether the two runs are equal.

    Raises:
        UserError: they are not two.
    """
    if len(runs) != 2:
        raise UserError(f"equal=true compares two runs, and there are {len(runs)}: say runs=[A,B].")
    found = compared(*runs)
    equal = f"{runs[0].name} and {runs[1].name} are equal in all {found.numbers} numbers of {found.steps} steps."
    more = [f"{found.alone} more steps"] if found.alone else []
    more += [f"{found.unpaired} more numbers"] if found.unpaired else []
    alone = f" {' and '.join(more)} were logged by one of them alone, and not compared." if more else ""
    print((found.difference or equal) + alone, flush=True)
    return found.difference is None
