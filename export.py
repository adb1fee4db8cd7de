"""A run's network as one file: python export.py run=<run dir>|latest format=onnx|torch_export."""

import sys

try:
    from alexlab.commands.cli import hydra_command
    from alexlab.engine.process import importing
except ModuleNotFoundError as error:
    print(f"error: {error}: run `make setup`, then `source .venv/bin/activate`.", file=sys.stderr)
    sys.exit(2)


@hydra_command("export")
def main(config):  # type: ignore[no-untyped-def]
    from alexlab.engine.rules import EXPORT_RULES, check

    check(config, EXPORT_RULES)
    with importing():
        from alexlab.commands.export import export

    export(config)


if __name__ == "__main__":
    main()
