"""Whether two runs went the same way, number by number: for a change that must not change what is trained."""

from collections.abc import Sequence

from alexlab.compare.runs import Row, Run
from alexlab.errors import UserError


def first_difference(a: Run, b: Run) -> str | None:
    """The first step at which the two differ in a number that both should have; None where they went the same way.

    Speed and time are left out. Runs whose steps are not logged alike are compared where both were.

    Raises:
        UserError: one has no numbers, or no step is logged in both.
    """
    for run in (a, b):
        if not run.rows:
            raise UserError(f"equal=true: {run.path} has no numbers to compare (its metrics.csv).")
    ones, others = _by_step(a.rows), _by_step(b.rows)
    both = sorted(ones.keys() & others.keys())
    if not both:
        raise UserError(
            f"equal=true: no step is logged in both {a.name} and {b.name}: run them with the same "
            "trainer.log_every_n_steps."
        )
    for step in both:
        for key in sorted(ones[step].keys() | others[step].keys()):
            one, other = ones[step].get(key), others[step].get(key)
            if one != other and not (one != one and other != other):
                return f"{a.name} and {b.name} differ first at step {step}: {key} is {_told(one)} and {_told(other)}."
    longer, shorter, steps = (a, b, ones) if max(ones) > max(others) else (b, a, others)
    if max(ones) != max(others):
        further = f"and {longer.name} goes on to step {max(steps)}; equal up to there."
        return f"{shorter.name} ends at step {both[-1]}, {further}"
    return None


def _told(value: float | None) -> str:
    return "not there" if value is None else repr(value)


def _by_step(rows: Sequence[Row]) -> dict[int, Row]:
    """All that was logged at a step, together: the rows of a resumed run may be divided otherwise."""
    found: dict[int, Row] = {}
    for row in rows:
        numbers = {k: v for k, v in row.items() if k.startswith(("train/", "val/", "test/", "lr"))}
        if numbers:
            found.setdefault(int(row["step"]), {}).update(numbers)
    return found


def say_equal(runs: Sequence[Run]) -> bool:
    """Prints whether the two runs are equal.

    Raises:
        UserError: they are not two.
    """
    if len(runs) != 2:
        raise UserError(f"equal=true compares two runs, and there are {len(runs)}: say runs=[A,B].")
    difference = first_difference(runs[0], runs[1])
    steps = sorted(_by_step(runs[0].rows).keys() & _by_step(runs[1].rows).keys())
    print(difference or f"{runs[0].name} and {runs[1].name} are equal in all {len(steps)} logged steps.", flush=True)
    return difference is None
