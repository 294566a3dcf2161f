"""What PROMISES.md says is shown by a test is shown by a test."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHOWN = re.findall(r"`(tests/[^`]+)`", (ROOT / "PROMISES.md").read_text())


@pytest.mark.parametrize("shown", SHOWN)
def test_each_promise_names_a_test_that_is_there(shown):
    file, _, name = shown.partition("::")
    text = (ROOT / file).read_text()
    assert re.search(rf"^def {name or 'test_'}", text, re.MULTILINE)


def test_each_line_of_the_page_names_a_test():
    lines = [row for row in (ROOT / "PROMISES.md").read_text().splitlines() if row.startswith("|")]
    told = [row for row in lines if not re.match(r"\|(---| fault | what comes)", row)]
    assert all("`tests/" in row for row in told) and len(told) > 10
