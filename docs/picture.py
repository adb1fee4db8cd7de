"""Draw docs/run.svg, the picture of the README.

python train.py KEY=VALUE ... | tee run.txt
python docs/picture.py run.txt KEY=VALUE ...

The lines that a slow run prints within an epoch are skipped: a terminal shows a bar instead.
"""

import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text


def main() -> None:
    shown = Path(sys.argv[1]).read_text()
    console = Console(record=True, width=130, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text(" ".join(["$ python train.py", *sys.argv[2:]]), style="bold"))
    for line in shown.splitlines():
        if re.match(r"epoch \d+/\d+, batch", line):
            continue
        console.print(Text.from_ansi(line), overflow="ellipsis", no_wrap=True)
    svg = console.export_svg(title="alexlab")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)  # a browser would fetch the font from a server
    Path(__file__).with_name("run.svg").write_text(
        svg.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")
    )


if __name__ == "__main__":
    main()
