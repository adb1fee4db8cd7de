"""Compare runs: python compare.py [runs=FOLDER|GLOB|[A,B]] [where="optimizer.lr>0.01"] [format=html]."""

import sys

try:
    from alexlab.commands.cli import hydra_command
except ModuleNotFoundError as error:
    print(f"error: {error}: run `make setup`, then `source .venv/bin/activate`.", file=sys.stderr)
    sys.exit(2)


@hydra_command("compare")
def main(config):  # type: ignore[no-untyped-def]
    from alexlab.engine.rules import COMPARE_RULES, check

    check(config, COMPARE_RULES)
    from alexlab.commands.compare import show

    show(config)


if __name__ == "__main__":
    main()
