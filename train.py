"""Train a network: python train.py model=alexnet data=folder data.root=PATH trainer=ddp  (--help lists the groups)."""

from alexlab.cli import hydra_command


@hydra_command("train")
def main(config):  # type: ignore[no-untyped-def]
    from alexlab.rules import check

    check(config)  # before the seconds that the heavy imports take
    from alexlab.run import fit

    return fit(config)


if __name__ == "__main__":
    main()
