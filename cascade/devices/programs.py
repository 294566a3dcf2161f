"""Compiled programs, kept from one run of a command to the next."""

from __future__ import annotations

import os
from pathlib import Path


def use_compilation_cache() -> None:
    """Keep XLA's compiled programs under the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    import jax

    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(base) / "cascade" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
