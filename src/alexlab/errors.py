"""The exceptions that a command shows on one screen, without a traceback."""


class UserError(ValueError):
    """A user's mistake, exit code 2. Its text names the value, the rule and the fix."""


class RunFailedError(RuntimeError):
    """A run on several devices failed; its ranks' tracebacks are printed already.

    Attributes:
        code: what the command exits with.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code
