"""A compact copy of an image folder: python prepare.py data.root=<folder> out=<new folder>."""

import sys

try:
    from alexlab.cli import hydra_command
    from alexlab.imports import importing
except ModuleNotFoundError as error:
    print(f"error: {error}: run `make setup`, then `source .venv/bin/activate`.", file=sys.stderr)
    sys.exit(2)


@hydra_command("prepare")
def main(config):  # type: ignore[no-untyped-def]
    from alexlab.rules import PREPARE_RULES, check

    check(config, PREPARE_RULES)
    with importing():
        from alexlab.prepare import prepare

    prepare(config)


if __name__ == "__main__":
    main()
