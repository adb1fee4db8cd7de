"""Whether two runs went the same way, number by number: for a change that must not change what is trained."""

from collections.abc import Sequence
from dataclasses import dataclass

from alexlab.compare.runs import Row, Run
from alexlab.errors import UserError


@dataclass
class Comparison:
    """
    Attributes:
        steps: at which both have logged a number of the same name.
        numbers: that were compared.
        alone: steps that one alone has logged, up to where the shorter one ends.
        difference: the first, in words; None where all are equal.
    """

    steps: int
    numbers: int
    alone: int
    difference: str | None


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
    end = min(max(ones), max(others))
    found = Comparison(len(both), 0, sum(step <= end for step in ones.keys() ^ others.keys()), None)
    for step in both:
        for key in sorted(ones[step].keys() & others[step].keys()):
            one, other = ones[step][key], others[step][key]
            found.numbers += 1
            if one != other and not (one != one and other != other):
                found.difference = f"{a.name} and {b.name} differ first at step {step}: {key} is {one!r} and {other!r}."
                return found
    if max(ones) != max(others):
        longer, shorter = (a, b) if max(ones) > max(others) else (b, a)
        found.difference = (
            f"{shorter.name} ends at step {end}, and {longer.name} goes on to step {max(*ones, *others)}; equal up to "
            "there."
        )
    return found


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
    alone = f" {found.alone} more steps were logged by one of them alone, and not compared." if found.alone else ""
    print((found.difference or equal) + alone, flush=True)
    return found.difference is None
