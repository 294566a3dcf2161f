"""The one exception that is a person's mistake rather than a bug."""

MOST_LETTERS = 1200


class UserError(ValueError):
    """A mistake in the input: its message is one line that says what, where, and what to do.

    The command line prints it as `error: ...` and exits with status 2, without a traceback. What it
    quotes of a file may be of any length: of a message that is too long for a line the middle is
    left out.
    """

    def __init__(self, message: object = ""):
        text = str(message)
        if len(text) > MOST_LETTERS:
            text = f"{text[: MOST_LETTERS // 2]} ... {text[-MOST_LETTERS // 4 :]}"
        super().__init__(text)
