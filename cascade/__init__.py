"""Text to image by cascaded pixel diffusion in JAX.

from cascade import Cascade
Cascade.load("scenes")("a red circle above a blue square", seed=0)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cascade.runner.cascade import Cascade, Picture

__all__ = ["Cascade", "Picture"]


def __getattr__(name: str) -> Any:  # `cascade --help` must not wait for JAX
    if name in __all__:
        from cascade.runner import cascade

        return getattr(cascade, name)
    raise AttributeError(f"module 'cascade' has no attribute {name!r}")
