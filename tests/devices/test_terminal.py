"""The bars on stderr."""

import io
import itertools

import pytest

from cascade.devices.terminal import bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stderr,least,most", [(io.StringIO(), 2, 3), (Terminal(), 11, 12)])
def test_a_log_gets_fewer_lines_than_a_terminal(stderr, least, most, monkeypatch):
    monkeypatch.setattr("sys.stderr", stderr)
    seconds = itertools.count()
    with bar(total=10, unit="step") as shown:
        shown.start_t = 0
        shown._time, shown.last_print_t = (lambda: next(seconds)), 0
        for _ in range(10):
            shown.update()
    told = stderr.getvalue()
    assert least <= told.count("\r") <= most and "10/10" in told
