"""A compact copy of an image folder: python prepare.py data.root=<folder> out=<new folder>."""

import sys

try:
    from alexlab.commands.cli import hydra_command
    from alexlab.engine.process import importing
except ModuleNotFoundError as error:
    print(f"error: {error}: run `make setup`, then `source .venv/bin/activate`.", file=sys.stderr)
    sys.exit(2)


@hydra_command("prepare")
def main(config):  # type: ignore[no-untyped-def]
    from alexlab.engine.rules import PREPARE_RULES, check

    check(config, PREPARE_RULES)
    with importing():
        from alexlab.commands.prepare import prepare

    prepare(config)


if __name__ == "__main__":
    main()
