"""The exceptions that are a person's mistake rather than a bug."""

from typing import Any

from cascade import ranges

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


class OptionError(UserError):
    """A mistake in the value of one option, which is called `until=` in Python and `--until` in
    words: the message has the name as Python does, `on_command_line` as the words do."""

    def __init__(self, option: str, value: Any, rule: object):
        """option: its name in Python. value: None if it is missing. rule: what it must be."""
        super().__init__(f"{option}={ranges.shown(value)}: {rule}")
        self._words = ("--" + option.replace("_", "-"), value, rule)

    @property
    def on_command_line(self) -> str:
        """The message for a person who typed `--option value`."""
        flag, value, rule = self._words
        return str(UserError(f"{flag}: {rule}" if value is None else f"{flag} {value}: {rule}"))
