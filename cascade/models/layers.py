"""The pieces that the networks are built from.

Images are [b, h, w, c]. Parameters are float32; a layer computes in the dtype of its input
(bfloat16 or float32), except that norms, FiLM and the softmax are always float32.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

Resample = Literal["down", "up"]
Remat = Literal[False, "nothing_saveable", "dots_with_no_batch_dims_saveable", "dots_saveable"]
Role = Literal["stream", "inner"]
Module = TypeVar("Module", bound=nnx.Module)


def attend(
    q: Float[Array, "b n c"],
    k: Float[Array, "b m c"],
    v: Float[Array, "b m c"],
    mask: Bool[Array, "b m"] | None,
    head_width: int,
) -> Float[Array, "b n c"]:
    """softmax(q k^T / sqrt(head_width)) v, head by head; softmax in float32.

    mask: True where a key may be seen; a row that sees none gives NaN, hence the null token.
    """
    q, k, v = (x.reshape(*x.shape[:2], -1, head_width) for x in (q, k, v))
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
    logits = logits * head_width**-0.5
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bhnm,bmhd->bnhd", weights, v)
    return out.reshape(*out.shape[:2], -1)


class GroupNorm(nnx.Module):
    """Group normalisation, FiLM and SiLU in one pass over the image (Wu & He 2018).

    Written from per-channel sums: mean, variance, scale, bias and FiLM fold into one
    multiply-add per channel, 2-4 times faster than nnx.GroupNorm on a CPU.
    groups: None is `group_count`, ours; public weights bring their own, and their epsilon.
    """

    def __init__(
        self,
        width: int,
        *,
        groups: int | None = None,
        epsilon: float = 1e-5,
        activation: Callable[[Array], Array] = jax.nn.silu,
    ):
        self.groups = groups or group_count(width)
        self.epsilon = epsilon
        self.activation = activation
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        film: Float[Array, "b 2*c"] | None = None,
        activate: bool = False,
    ) -> Float[Array, "b h w c"]:
        """film: [scale - 1, shift], applied after the norm; activate: the activation at the end."""
        x32 = x.astype(jnp.float32)
        b, h, w, c = x.shape
        moments = jnp.stack([x32.mean((1, 2)), jnp.square(x32).mean((1, 2))])
        by_group = moments.reshape(2, b, self.groups, c // self.groups).mean(-1)
        mean, square = jnp.repeat(by_group, c // self.groups, axis=-1)
        rstd = lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + self.epsilon)
        multiply = rstd * self.scale[...]
        add = self.bias[...] - mean * multiply
        if film is not None:
            scale, shift = jnp.split(film.astype(jnp.float32), 2, axis=-1)
            multiply, add = multiply * (1 + scale), add * (1 + scale) + shift
        y = x32 * multiply[:, None, None] + add[:, None, None]
        return (self.activation(y) if activate else y).astype(x.dtype)


def group_count(width: int) -> int:
    """32 groups as in the papers; fewer in narrow layers, where a group holds at least 4 channels.

    One channel to a group would be instance normalisation, which forgets every channel's mean.
    """
    return next(g for g in range(min(32, width // 4), 0, -1) if width % g == 0)


class Conv(nnx.Module):
    """conv3x3 with a bias. kernel [3, 3, in, out]; the sides shrink by stride."""

    def __init__(
        self,
        width_in: int,
        width: int,
        *,
        stride: int = 1,
        zero: bool = False,
        rngs: nnx.Rngs,
    ):
        self.stride = stride
        init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, width_in, width)))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        y = conv3x3(x, self.kernel[...].astype(x.dtype), self.stride)
        return y + self.bias[...].astype(x.dtype)


def conv3x3(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"], stride: int = 1
) -> Float[Array, "b h2 w2 d"]:
    """3x3 convolution, zero-padded by one pixel; sides must be multiples of the stride.

    Its gradients are written out for the CPU's sake. There XLA brings convolutions into the form
    its fast kernels know only outside of loops: in the body of a scan (over blocks, or over parts
    of a batch) the gradients that it derives itself run 20 times slower. So ours start in that
    form. The price: forward-mode differentiation (jax.jvp) cannot pass.
    """
    y: Any = _conv3x3(x, kernel, stride)
    return y


def _convolution(x: Array, kernel: Array, stride: int) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv3x3(x: Array, kernel: Array, stride: int) -> Array:
    return _convolution(x, kernel, stride)


def _conv3x3_forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _convolution(x, kernel, stride), (x, kernel)


def _conv3x3_backward(stride: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    return lax.platform_dependent(
        *saved,
        g,
        cpu=functools.partial(_conv3x3_gradients_on_cpu, stride),
        default=lambda x, kernel, g: jax.vjp(
            functools.partial(_convolution, stride=stride), x, kernel
        )[1](g),
    )


def _conv3x3_gradients_on_cpu(
    stride: int, x: Array, kernel: Array, g: Array
) -> tuple[Array, Array]:
    # A strided convolution is every stride-th pixel of the plain one: zeros where it has none.
    gaps = (0, stride - 1, stride - 1)
    g = lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), gaps, gaps, (0, 0, 0)))
    dx = _convolution(g, kernel[::-1, ::-1].swapaxes(2, 3), 1)
    # dkernel[i, j] = sum over images and pixels of x, shifted by (i, j), times g: a convolution
    # with the images as channels and g as the kernel.
    dkernel = _convolution(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), 1)
    return dx, dkernel.transpose(1, 2, 0, 3)


_conv3x3.defvjp(_conv3x3_forward, _conv3x3_backward)


class Linear(nnx.Module):
    """x @ kernel + bias on the last axis, in the dtype of x; nnx.Linear would go to float32."""

    def __init__(self, width_in: int, width: int, *, zero: bool = False, rngs: nnx.Rngs):
        init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (width_in, width)))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)

    def halves(
        self, x: Float[Array, "*b c"]
    ) -> tuple[Float[Array, "*b d2"], Float[Array, "*b d2"]]:
        """The first and the second half of the result, each from its half of the kernel.

        Where channels are split over devices, a half of the result would have to be gathered.
        """
        kernels, biases = jnp.split(self.kernel[...], 2, axis=-1), jnp.split(self.bias[...], 2)
        first, second = (
            x @ kernel.astype(x.dtype) + bias.astype(x.dtype)
            for kernel, bias in zip(kernels, biases, strict=True)
        )
        return first, second


def coordinates(x: Float[Array, "b h w c"]) -> Float[Array, "b h w 2"]:
    """(y, x) of every pixel's centre, from -1 at one edge of the picture to 1 at the other."""
    b, h, w, _ = x.shape
    # Counted in float32: bfloat16 has no odd numbers above 256.
    y, x_ = ((2 * jnp.arange(side, dtype=jnp.float32) + 1) / side - 1 for side in (h, w))
    grid = jnp.stack(jnp.meshgrid(y, x_, indexing="ij"), axis=-1)
    return jnp.broadcast_to(grid.astype(x.dtype), (b, h, w, 2))


def shrink(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Mean of each 2x2 square of pixels."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def enlarge(x: Float[Array, "b h w c"], factor: int = 2) -> Float[Array, "b h2 w2 c"]:
    """Each pixel repeated in a factor x factor square."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, factor, w, factor, c))
    return x.reshape(b, h * factor, w * factor, c)


def space_to_depth(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b h2 w2 d"]:
    """Each patch x patch square of pixels as one pixel of patch * patch * c channels."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b h2 w2 d"]:
    """The inverse of space_to_depth."""
    b, h, w, c = x.shape
    c = c // patch**2
    x = x.reshape(b, h, w, patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, c)


def stack(make: Callable[[nnx.Rngs], Module], count: int, rngs: nnx.Rngs) -> Module:
    """`count` equal modules as one, its parameters with a leading axis."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), count)
    params = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(keys)
    return nnx.merge(graphdef, params)


def run(block: nnx.Module, remat: Remat, h: Array, context: Any, *rest: Any) -> Array:
    """block(h, context, *rest), keeping for the backward pass what remat says."""
    call: Any = block
    if not remat:
        return placed(call(h, context, *rest), "stream")
    graphdef, params = nnx.split(call)
    recomputed = jax.checkpoint(
        lambda params, *args: nnx.merge(graphdef, params)(*args),
        policy=getattr(jax.checkpoint_policies, remat),
    )
    return placed(recomputed(params, h, context, *rest), "stream")


def run_stack(
    blocks: Any,
    remat: Remat,
    h: Array,
    context: Any,
    skips: list[Array] | None = None,
    key: Array | None = None,
) -> tuple[Array, list[Array]]:
    """Runs stacked blocks one after the other; returns the last output and all of them, in order.

    blocks: of `stack`, or None for h itself.
    skips: one per block, concatenated to its input. key: for dropout.
    One lax.scan, so that the program and the time to compile it do not grow with depth.
    """
    if blocks is None:
        return h, []
    graphdef, params = nnx.split(blocks)

    def step(h: Array, xs: Any) -> tuple[Array, Array]:
        params, skip, key = xs
        h = run(nnx.merge(graphdef, params), remat, h, context, skip, key)
        return h, h

    count = len(jax.tree.leaves(params)[0])
    keys = None if key is None else jax.random.split(key, count)
    h, outputs = lax.scan(step, h, (params, None if skips is None else jnp.stack(skips), keys))
    return h, list(outputs)


_place: ContextVar[Callable[[Array, Role], Array] | None] = ContextVar("place", default=None)


@contextlib.contextmanager
def placing(place: Callable[[Array, Role], Array]) -> Iterator[None]:
    """While entered, what networks are traced here pass activations through `place`.

    Networks know no mesh; who runs them on one says here what their roles mean on it.
    """
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


def placed(x: Array, role: Role) -> Array:
    """x itself, on the devices that `placing` gives its role.

    stream: between blocks. inner: between the two layers of a block (convolutions, or projections
    of attention), whose channels are independent of each other but for groups and heads.
    """
    place = _place.get()
    return x if place is None else place(x, role)


def split_keys(key: Array | None, count: int) -> list[Array | None]:
    """`count` keys, or as many None."""
    return [None] * count if key is None else list(jax.random.split(key, count))
