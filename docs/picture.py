"""Draws docs/run.svg, the README's picture: python train.py | tee run.txt; python docs/picture.py run.txt"""

import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text


def main() -> None:
    shown = Path(sys.argv[1]).read_text()
    console = Console(record=True, width=124, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text("$ python train.py", style="bold"))
    for line in shown.splitlines():
        console.print(Text.from_ansi(line), overflow="ellipsis", no_wrap=True)
    svg = console.export_svg(title="alexlab")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)  # which would be fetched from elsewhere
    Path(__file__).with_name("run.svg").write_text(
        svg.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")
    )


if __name__ == "__main__":
    main()
