"""How fast a training would be, and what bounds it: python benchmark.py [group=option] [key=value]."""

import sys

try:
    from alexlab.commands.cli import hydra_command
    from alexlab.engine.process import importing
except ModuleNotFoundError as error:
    print(f"error: {error}: run `make setup`, then `source .venv/bin/activate`.", file=sys.stderr)
    sys.exit(2)


@hydra_command("benchmark")
def main(config):  # type: ignore[no-untyped-def]
    from alexlab.engine.rules import BENCHMARK_RULES, RULES, check

    check(config, RULES)
    check(config, BENCHMARK_RULES)
    with importing():
        from alexlab.commands.benchmark import benchmark

    benchmark(config)


if __name__ == "__main__":
    main()
