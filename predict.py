"""What a run says of images: python predict.py run=<run dir>|latest images=<file|folder|glob>."""

import sys

try:
    from alexlab.commands.cli import hydra_command
    from alexlab.engine.process import importing
except ModuleNotFoundError as error:
    print(f"error: {error}: run `make setup`, then `source .venv/bin/activate`.", file=sys.stderr)
    sys.exit(2)


@hydra_command("predict")
def main(config):  # type: ignore[no-untyped-def]
    from alexlab.engine.rules import PREDICT_RULES, check

    check(config, PREDICT_RULES)
    with importing():
        from alexlab.commands.predict import predict

    predict(config)


if __name__ == "__main__":
    main()
