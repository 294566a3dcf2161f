"""The applications, one file or folder each; any can be deleted without a trace.

A task may define

    main(argv)     a verb of its own, `cascade NAME`, with the first line of its docstring as help
    SampleOptions  options that it adds to `cascade sample`: a dataclass whose `steering` says what
                   steers each stage, and whose `record` what the JSON beside a picture says of it

and is found by lying here: nothing names it.
"""

import importlib
import pkgutil
from typing import Any


def that_have(attribute: str) -> dict[str, Any]:
    """The tasks that define it: name -> what they define."""
    modules = {
        found.name: importlib.import_module(f"{__name__}.{found.name}")
        for found in pkgutil.iter_modules(__path__)
    }
    return {n: getattr(m, attribute) for n, m in modules.items() if hasattr(m, attribute)}
