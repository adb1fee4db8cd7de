import pytest, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "callbacks"))
from resuming import difference
from test_exact_resume import MUTATED, MUTATIONS, _stop_after_checkpoint


def test_x(harness, capsys):
    straight = harness.train("straight", *MUTATED)
    for name, mutate in MUTATIONS.items():
        with harness.monkeypatch.context() as patch:
            mutate(patch)
            try:
                d = difference(
                    straight,
                    harness.train_with_stops("s", [(c, ("before", "after")[c % 2]) for c in range(1, 11)], *MUTATED),
                )
            except Exception as e:
                d = repr(e)[:80]
        with capsys.disabled():
            print(name, "->", str(d)[:100], flush=True)
