"""How long commands take to start: --help and --cfg job of train.py compared with a bare Hydra script, and the imports
of a training as train.py does them compared with plain imports, in turn.

python benchmarks/startup.py [--rounds 15]
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from common import ROOT, about, in_turn, options, run

BARE = """import hydra
@hydra.main(version_base="1.3", config_path=None)
def main(config): pass
main()
"""
IMPORT = "from alexlab.commands import train"
PAUSED = f"""from alexlab.engine.process import importing
with importing():
    {IMPORT}
"""


def seconds(words: list[str], folder: str) -> float:
    start = time.perf_counter()
    run(words, cwd=folder)
    return time.perf_counter() - start


def main() -> None:
    args = options(__doc__, rounds=15)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "bare.py"
        script.write_text(BARE)
        train = str(ROOT / "train.py")
        commands = {
            "python": ["-c", "pass"],
            "bare --help": [str(script), "--help"],
            "bare --cfg job": [str(script), "--cfg", "job"],
            "train --help": [train, "--help"],
            "train --cfg job": [train, "--cfg", "job"],
            "bare imports": ["-c", IMPORT],
            "train imports": ["-c", PAUSED],
        }
        measures = {name: partial(seconds, words, folder) for name, words in commands.items()}
        times = in_turn(args.rounds, measures, warm_up=True)
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:16} {median:.3f} s")
    kinds = ("--help", "--cfg job", "imports")
    ratios = {kind: round(medians[f"train {kind}"] / medians[f"bare {kind}"], 2) for kind in kinds}
    print(about("hydra-core", seconds=medians, ratio=ratios, rounds=args.rounds))


if __name__ == "__main__":
    main()
