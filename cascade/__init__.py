"""Text to image by cascaded pixel diffusion in JAX.

from cascade import Cascade
Cascade.load("scenes")("a red circle above a blue square", seed=0)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cascade.runner.cascade import Cascade
    from cascade.runner.picture import Picture

    __version__: str

__all__ = ["Cascade", "Picture"]


def __getattr__(name: str) -> Any:  # `cascade --help` must not wait for JAX
    if name == "Cascade":
        from cascade.runner.cascade import Cascade

        return Cascade
    if name == "Picture":
        from cascade.runner.picture import Picture

        return Picture
    if name == "__version__":
        from importlib.metadata import version

        return version("cascade-diffusion")
    raise AttributeError(f"module 'cascade' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"} - {"Any", "TYPE_CHECKING"})
