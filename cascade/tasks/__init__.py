"""The applications, one file or folder each; any can be deleted without a trace.

A task may define

    main(argv)     a verb of its own, `cascade NAME`, with the first line of its docstring as help;
                   if it returns words, such as ["sample", ...], that command does the work
    evaluate(argv) figures of merit, as `cascade eval NAME`: returns JSON values for stdout; the
                   first line of its docstring is its help
    SampleOptions  options that it adds to `cascade sample`: a dataclass whose `steering` says what
                   steers each stage, and whose `record` what the JSON beside a picture says of it;
                   `stages`, if it has that, gives the stages with the settings for what it does

and is found by lying here: nothing names it. Options of a module elsewhere are found if the command
line trusts it (`--trust MODULE`).
"""

import importlib
import pkgutil
from typing import Any

from cascade import config


def that_have(attribute: str) -> dict[str, Any]:
    """The tasks that define it, here and in trusted modules: module's name -> what they define."""
    here = [f"{__name__}.{found.name}" for found in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(name) for name in (*here, *config.trusted)}
    return {n: getattr(m, attribute) for n, m in modules.items() if hasattr(m, attribute)}
