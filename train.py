"""Train a network: python train.py model=alexnet data=folder data.root=PATH trainer=ddp  (--help lists the groups)."""

import sys

try:
    from alexlab.commands.cli import hydra_command
    from alexlab.engine.process import importing
except ModuleNotFoundError as error:
    print(f"error: {error}: run `make setup`, then `source .venv/bin/activate`.", file=sys.stderr)
    sys.exit(2)


@hydra_command("train")
def main(config):  # type: ignore[no-untyped-def]
    from alexlab.engine.rules import check

    check(config)  # before the seconds that the heavy imports take
    with importing():
        from alexlab.commands.train import fit

    return fit(config)


if __name__ == "__main__":
    main()
