"""The one exception for a user's mistake: shown on one screen, without a traceback, exit code 2."""


class UserError(ValueError):
    """Its text names the value, the rule and the fix."""
