"""Draw the figures of a run: python figures.py run=<run dir>|latest [ckpt=best|last|PATH]."""

import sys

try:
    from alexlab.commands.cli import hydra_command
    from alexlab.engine.process import importing
except ModuleNotFoundError as error:
    print(f"error: {error}: run `make setup`, then `source .venv/bin/activate`.", file=sys.stderr)
    sys.exit(2)


@hydra_command("figures")
def main(config):  # type: ignore[no-untyped-def]
    from alexlab.engine.rules import FIGURES_RULES, check

    check(config, FIGURES_RULES)
    with importing():
        from alexlab.commands.figures import redraw

    redraw(config)


if __name__ == "__main__":
    main()
