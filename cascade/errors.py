"""The one exception that is a person's mistake rather than a bug."""


class UserError(ValueError):
    """A mistake in the input: its message is one line that says what, where, and what to do.

    The command line prints it as `error: ...` and exits with status 2, without a traceback.
    """
