"""Evaluate a run: python eval.py run=<run dir>|latest ckpt=best|last|PATH [data.root=PATH]."""

import sys

try:
    from alexlab.commands.cli import hydra_command
    from alexlab.engine.process import importing
except ModuleNotFoundError as error:
    print(f"error: {error}: run `make setup`, then `source .venv/bin/activate`.", file=sys.stderr)
    sys.exit(2)


@hydra_command("eval")
def main(config):  # type: ignore[no-untyped-def]
    from alexlab.engine.rules import EVAL_RULES, check

    check(config, EVAL_RULES)
    with importing():
        from alexlab.commands.evaluate import evaluate

    return evaluate(config)


if __name__ == "__main__":
    main()
