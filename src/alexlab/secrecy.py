"""Secrets stay out of what a run leaves behind: its config, its log, its summary, its checkpoints, and W&B. Light.

A secret comes from the environment: `logger.wandb.notes='${oc.env:TOKEN}'`. Wherever its value would be written, its
name is written instead, so that a run that goes on finds it in the environment again. One that stands on the command
line itself, where everybody on the machine can read it, is refused.
"""

import os
import re
from typing import Any

NAMES = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)  # of environment variables
KEYS = re.compile(
    r"(^|[._])(api_?key|access_?key|token|secret|passw(or)?d|credentials?)$", re.IGNORECASE
)  # of a config
URL = re.compile(r"://[^/\s:@]+:([^@/\s]+)@")
SHORTEST = 8  # characters: shorter ones are no secrets, and would be found in other words


def known() -> dict[str, str]:
    """The values of the environment's secrets, longest first, and what is written in their place."""
    found = {
        value: f"${{oc.env:{name}}}"
        for name, value in os.environ.items()
        if NAMES.search(name) and len(value) >= SHORTEST and not os.path.exists(value)  # noqa: PTH110, no file of one
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def masked(text: str) -> str:
    for value, name in known().items():
        text = text.replace(value, name)
    return text


def hidden(plain: Any) -> Any:
    """Plain values, with the names of secrets in the place of their values, and *** for those that `mistakes` tells."""
    replaced = known() | {value: "***" for _, value in _literal(plain)}

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        if isinstance(value, str):
            for secret, name in replaced.items():
                value = value.replace(secret, name)
        return value

    return walk(plain)


def mistakes(plain: dict[str, Any]) -> list[str]:
    """What is said of each secret that stands in the config itself; never its value."""
    return [
        f"{key}: a secret on the command line is seen by all on this machine, and would be kept with the run: put it "
        f"into an environment variable, and give {key}='${{oc.env:ITS_NAME}}'."
        for key, _ in _literal(plain)
    ]


def _literal(node: Any, key: str = "") -> list[tuple[str, str]]:
    """(key, secret) of those below `node` that are not of the environment."""
    if isinstance(node, dict):
        return [found for name, value in node.items() if name != "overrides"
                for found in _literal(value, f"{key}.{name}" if key else str(name))]  # fmt: skip
    if isinstance(node, list):
        return [found for value in node for found in _literal(value, key)]
    if not isinstance(node, str):
        return []
    secrets = URL.findall(node)
    if KEYS.search(key) and len(node) >= SHORTEST:
        secrets.append(node)
    return [(key, secret) for secret in secrets if masked(secret) == secret and not secret.startswith("${")]
