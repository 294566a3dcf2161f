"""Networks as diffusers and transformers publish them: folders of config.json and safetensors.

Our modules carry the published names, so a parameter's path is the tensor's name but for its last
part: `conv1.kernel` is `conv1.weight` with its axes in another order, `norm1.scale` is
`norm1.weight`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp

from cascade.config import read_json
from cascade.errors import UserError
from cascade.models import Network
from cascade.storage import checksums, weights
from cascade.storage.weights import Origin

Config = TypeVar("Config")
Shapes = Mapping[str, Sequence[int]]
"""The shapes of tensors, by name."""


def read_config(folder: Path, parse: Callable[[Mapping[str, Any]], Config], model: str) -> Config:
    """Read folder/config.json as `parse` does; UserError naming the file and the field.

    parse: the fields -> a config; it raises ValueError naming a field that does not fit.
    model: the class whose fields they are, such as "diffusers.AutoencoderKL".
    """
    file = folder / "config.json"
    checksums.check(file)
    fields = read_json(file)
    if not isinstance(fields, dict):
        raise UserError(f"{file}: must hold the fields of a {model.split('.')[-1]}")
    try:
        return parse(fields)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise UserError(f"{file}: {e}") from None


def by_name(target: Any, shapes: Shapes | None = None) -> dict[str, Origin]:
    """Say where in the files each parameter of a network with the published names is.

    target: the parameters' shapes, as nested dicts. shapes: the tensors', which do not matter.
    """
    return {path: _origin(path, len(leaf.shape)) for path, leaf in weights.leaves(target)}


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published network on disk."""

    folder: Path
    """The folder of its config.json and safetensors."""
    config: Any
    """Our config of it, as `read_config` reads it."""
    given: tuple[Any, ...] = ()
    """What the config's `build` takes besides."""
    what: str
    """How errors call the network."""
    model: str
    """Its class, such as "diffusers.AutoencoderKL", for the error that refuses pickles."""
    stem: str = "diffusion_pytorch_model"
    """What the names of its files begin with."""
    origins: Callable[[Any, Shapes], dict[str, Origin]] = by_name
    """A function: (parameters' shapes, tensors' shapes) -> where each parameter is."""
    ignored: str | None = None
    """A regular expression of tensors that may be left over; None allows none."""

    def read(self, dtype: str, shardings: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        """Read the parameters, each straight onto its devices, as nested dicts of arrays.

        dtype: what they are, whatever the files hold. shardings: parameters as ShapeDtypeStructs ->
        the placement of each, as `partial(cascade.devices.sharding.shardings, mesh=mesh)`; None is
        the default device.
        Raises UserError for anything missing, damaged, misshapen or left over.
        """
        with self.opened() as (opened, origins):
            target = weights.as_target(self.abstract(), lambda _: jnp.dtype(dtype), shardings)
            return weights.read(opened, origins, target)

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[weights.Weights, dict[str, Origin]]]:
        """Open the files; gives them, checked to be all of the network, and where in them each
        parameter is. Raises UserError as `read` does."""
        library, name = self.model.split(".")
        convert = (
            f'python -c "from {library} import {name} as M; '
            "M.from_pretrained('SOURCE', use_safetensors=False).save_pretrained('DIR')\""
        )
        with weights.opened(self.folder, self.stem, what=self.what, convert=convert) as opened:
            yield opened, self.fit(opened.name, opened.shapes)

    def fit(self, name: str, shapes: Shapes) -> dict[str, Origin]:
        """Give the origins, if tensors of these shapes are this network; UserError if not.

        name: what the error calls the weights.
        """
        target = self.abstract()
        origins = self.origins(target, shapes)
        weights.fit(name, shapes, origins, target, ignored=self.ignored)
        return origins

    def abstract(self) -> dict[str, Any]:
        """Give the parameters' shapes, as nested dicts of ShapeDtypeStructs."""
        return Network(self.config, *self.given).abstract()

    @property
    def files(self) -> list[Path]:
        """The paths of all its safetensors."""
        return sorted(self.folder.glob("*.safetensors"))


def write(path: Path, networks: Mapping[str, Published], dtype: str | None = None) -> None:
    """Write published weights as one safetensors file of ours, tensor by tensor.

    networks: by what their parameters' paths begin with, "" or such as "autoencoder/". dtype: what
    they are stored as, in safetensors' spelling; None keeps that of each tensor.
    Raises UserError for weights that are missing, damaged, misshapen or left over.
    """
    with contextlib.ExitStack() as stack:
        sources, tensors = {}, []
        for prefix, network in networks.items():
            opened, origins = stack.enter_context(network.opened())
            for leaf_path, leaf in weights.leaves(network.abstract()):
                name = (prefix + leaf_path).replace("/", ".")
                origin = origins[leaf_path]
                sources[name] = opened, origin, leaf.shape
                tensors.append((name, leaf.shape, dtype or opened.dtype(origin.names[0])))

        def read(name: str) -> Any:
            opened, origin, shape = sources[name]
            return opened.whole(origin, shape)

        weights.write(path, tensors, read)


def _origin(path: str, rank: int) -> Origin:
    *modules, leaf = path.split("/")
    if leaf == "kernel":
        # Linear is [out, in] there and so is, with two axes of length 1, a 1x1 convolution.
        axes = (2, 3, 1, 0) if rank == 4 else (1, 0)
        return Origin((".".join([*modules, "weight"]),), axes)
    leaf = {"scale": "weight", "embedding": "weight"}.get(leaf, leaf)
    return Origin((".".join([*modules, leaf]),))
