"""How long commands take to start: --help and --cfg job of train.py compared with a bare Hydra script, and the imports
of a training as train.py does them compared with plain imports, in turn.

python benchmarks/startup.py [--rounds 15]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
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
        times: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(rounds + 1):  # the first round fills caches
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, check=True)
                if number:
                    times[name].append(time.perf_counter() - start)
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:16} {seconds:.3f} s")
    ratios = {
        kind: round(medians[f"train {kind}"] / medians[f"bare {kind}"], 2)
        for kind in ("--help", "--cfg job", "imports")
    }
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    about = {"hydra": version("hydra-core"), "python": sys.version.split()[0], "commit": git.stdout.strip()}
    print(json.dumps({"seconds": medians, "ratio": ratios, "rounds": rounds, **about}))


if __name__ == "__main__":
    main()
