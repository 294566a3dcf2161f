"""The contract of a network, and a network as a pure function of its parameters.

>>> network = Network(UNetConfig(levels=(Level(width=128, blocks=2),)), Widths())
>>> params = network.init(jax.random.key(0))  # nested dict of arrays
>>> y = network(params, x, time, Signals())
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx
from jaxtyping import Array, Key

from cascade.models.layers import Remat
from cascade.models.signals import Widths

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What a diffusion network is, as a stage sees it; subclasses are the networks' configs.

    `build` returns an nnx.Module that is called with

        x        [b, *d, in_channels], noisy examples
        time     [b], whatever number the stage tells for the noise of x; ours take 0..1000
        signals  what else it is told (`Signals`), of the widths that it was built for
        key      for dropout; None means that there is none

    and returns [b, *d, out_channels] in float32: a prediction in the space that the stage names,
    and if it learns the variance of its steps, as many channels of that behind it. It is a pure
    function of its parameters: no running statistics, no random numbers but the key's. What it
    cannot be built for or called with raises ValueError naming the field.
    """

    in_channels: int = 3
    """Channels of x."""
    out_channels: int = 3
    """Channels of the output: in_channels, or twice as many with a learned variance."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations; parameters, norms, softmax and output are float32."""
    remat: Remat = False
    """What each block keeps for its backward pass, which recomputes the rest: a policy of
    jax.checkpoint_policies, from least memory to most; False keeps everything."""

    @property
    def embedding_width(self) -> int:
        """Width of the vectors that are added to the embedding of time."""
        raise NotImplementedError

    @property
    def time_width(self) -> int:
        """Width of the sinusoids that a time is turned into first."""
        return self.embedding_width // 4

    @property
    def side_multiple(self) -> int:
        """What the height and the width of an image must be divisible by."""
        return 1

    @property
    def attends_to_itself(self) -> bool:
        """Whether places of x attend to each other, so that what is drawn depends on all of it."""
        return True

    def check(self, widths: Widths) -> None:
        """Raise ValueError unless the network can be told signals of these widths."""

    def check_sides(self, height: int, width: int) -> None:
        """Raise ValueError unless the network divides such an image."""
        name, multiple = type(self).__name__, self.side_multiple
        if height % multiple or width % multiple:
            raise ValueError(
                f"image sides must be multiples of {multiple} (patch and strides of {name}), "
                f"got {height}x{width}"
            )

    def build(self, widths: Widths, *, rngs: nnx.Rngs) -> Any:
        """The network, with fresh parameters."""
        raise NotImplementedError


class Network:
    """A config's module without its parameters: they go in and come out as nested dicts of arrays.

    Keys are strings at every depth, also where the module holds a list: joined by "/" they name a
    parameter in sharding rules and safetensors files: "encoder/0/rest/residual/conv1/kernel" is
    [blocks, 3, 3, in, out], since equal blocks are stacked along a leading axis ("rest", "blocks").
    """

    def __init__(self, config: Any, *given: Any):
        """config: anything with `build(*given, rngs=rngs)`; all of it hashable."""
        self.config = config
        self._given = given
        self._graphdef, self._abstract = _traced(config, given)
        self._paths = [path for path, _ in nnx.to_flat_state(self._abstract)]

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh float32 parameters. The same key gives the same ones."""
        keys = iter(jax.random.split(key, max(1, len(self._paths))))
        return _named(nnx.state(self.config.build(*self._given, rngs=_Keys(keys.__next__))))

    def abstract(self) -> Params:
        """The shapes and dtypes of `init`, without any memory."""
        return _named(self._abstract)

    def __call__(self, params: Params, *inputs: Any) -> Any:
        """The module with these parameters, called with these inputs."""
        return self.bind(params)(*inputs)

    def bind(self, params: Params) -> Any:
        """The module that holds these parameters, to be called as its own class says."""
        state = nnx.from_flat_state((path, _at(params, path)) for path in self._paths)
        return nnx.merge(self._graphdef, state)


@functools.cache
def _traced(config: Any, given: tuple[Any, ...]) -> tuple[Any, Any]:
    """The module's graph and the shapes of its parameters: seconds of tracing, once a config."""
    rngs = _Keys(lambda: jax.random.key(0))
    return nnx.split(nnx.eval_shape(lambda: config.build(*given, rngs=rngs)))


class _Keys(nnx.Rngs):
    """Keys from elsewhere. nnx.Rngs counts, and makes a key of each number: a third of what there
    is to compile, and in a trace the square of that number (10 seconds for a large network)."""

    def __init__(self, draw: Callable[[], Key[Array, ""]]):
        super().__init__()
        self._draw = draw

    def params(self) -> Key[Array, ""]:
        return self._draw()


def _named(state: Any) -> Params:
    """nnx.State -> nested dict; nnx names the items of a list by integers."""
    params: Params = {}
    for path, variable in nnx.to_flat_state(state):
        node = params
        for name in path[:-1]:
            node = node.setdefault(str(name), {})
        node[str(path[-1])] = variable.get_value()
    return params


def _at(params: Params, path: tuple[Any, ...]) -> Array:
    node: Any = params
    for name in path:
        node = node[str(name)]
    return node
