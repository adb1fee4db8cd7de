"""Save the dashboard of a W&B project, or update it in place: python dashboard.py [dry_run=true]."""

import sys

try:
    from alexlab.commands.cli import hydra_command
except ModuleNotFoundError as error:
    print(f"error: {error}: run `make setup`, then `source .venv/bin/activate`.", file=sys.stderr)
    sys.exit(2)


@hydra_command("dashboard")
def main(config):  # type: ignore[no-untyped-def]
    from alexlab.commands.dashboard import save_dashboard
    from alexlab.engine.rules import DASHBOARD_RULES, check

    check(config, DASHBOARD_RULES)
    save_dashboard(config)


if __name__ == "__main__":
    main()
