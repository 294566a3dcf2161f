"""What a person at a terminal sees of long work: a bar on stderr."""

import sys
from typing import Any

SECONDS_IN_A_LOG = 30
"""From one line to the next where stderr is a file or a pipe: a log that people read afterwards."""


def bar(**options: Any) -> Any:
    """A tqdm bar with these options, as wide as the terminal; in a log it says less often how far
    the work is."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else SECONDS_IN_A_LOG
    return tqdm(dynamic_ncols=True, mininterval=interval, maxinterval=interval * 2, **options)
