"""How fast a training would be, and what bounds it: python benchmark.py [group=option] [key=value]."""

import sys

try:
    from alexlab.cli import hydra_command
    from alexlab.imports import importing
except ModuleNotFoundError as error:
    print(f"error: {error}: run `make setup`, then `source .venv/bin/activate`.", file=sys.stderr)
    sys.exit(2)


@hydra_command("benchmark")
def main(config):  # type: ignore[no-untyped-def]
    from alexlab.rules import BENCHMARK_RULES, RULES, check

    check(config, RULES)
    check(config, BENCHMARK_RULES)
    with importing():
        from alexlab.benchmark import benchmark

    benchmark(config)


if __name__ == "__main__":
    main()
