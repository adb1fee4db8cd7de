"""Whether an API key of W&B is at hand. Light."""

import logging
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

log = logging.getLogger("alexlab")


def refused(error: Exception) -> bool:
    """Whether W&B's AuthenticationError is about the key: it is one too where the server could not be asked."""
    status = getattr(getattr(error.__cause__, "response", None), "http_status", None)
    return error.__cause__ is None or status in (401, 403)


def key_at_hand() -> bool:
    """An API key in the environment or in the netrc file, where `wandb login` puts it; asks nobody."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        file = Path(path).expanduser() if path else None
        if file is not None and file.is_file():
            try:
                return netrc.netrc(str(file)).authenticators(host) is not None
            except netrc.NetrcParseError as error:
                log.warning("W&B: %s cannot be read as a netrc file (%s): no key is taken from it.", file, error)
                return False
    return False
