"""A network as diffusers and transformers publish it: a folder of config.json and safetensors.

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
from cascade.storage import weights
from cascade.storage.weights import Origin

Config = TypeVar("Config")
Shapes = Mapping[str, Sequence[int]]
"""Of tensors, by name."""


def read_config(folder: Path, parse: Callable[[Mapping[str, Any]], Config], model: str) -> Config:
    """parse(folder/config.json). Raises UserError naming the file and the field.

    model: the class whose fields they are.
    """
    file = folder / "config.json"
    fields = read_json(file)
    if not isinstance(fields, dict):
        raise UserError(f"{file}: must hold the fields of a {model.split('.')[-1]}")
    try:
        return parse(fields)
    except (TypeError, ValueError) as e:
        raise UserError(f"{file}: {e}") from None


def by_name(target: Any, shapes: Shapes | None = None) -> dict[str, Origin]:
    """Where in the files each parameter is, of a network whose modules have the published names."""
    return {path: _origin(path, len(leaf.shape)) for path, leaf in weights.leaves(target)}


@dataclass(frozen=True, kw_only=True)
class Published:
    """One network on disk.

    config: ours, as `read_config` reads it. given: what its `build` takes besides. what: how errors
    call the network. stem: of the names
    of its files. model: its class, such as "diffusers.AutoencoderKL", for the error that refuses
    pickles. origins: (parameters' shapes, tensors' shapes) -> where each parameter is.
    ignored: a regular expression of tensors that may be left over.
    """

    folder: Path
    config: Any
    given: tuple[Any, ...] = ()
    what: str
    model: str
    stem: str = "diffusion_pytorch_model"
    origins: Callable[[Any, Shapes], dict[str, Origin]] = by_name
    ignored: str | None = None

    def read(self, dtype: str, shardings: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        """The parameters, each read straight onto its devices; dtype: theirs.

        shardings: parameters as ShapeDtypeStructs -> the placement of each, as
        `partial(cascade.devices.sharding.shardings, mesh=mesh)`; None is the default device.
        Raises UserError for anything missing, damaged, misshapen or left over.
        """
        with self.opened() as (opened, origins):
            target = weights.as_target(self.abstract(), lambda _: jnp.dtype(dtype), shardings)
            return weights.read(opened, origins, target)

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[weights.Weights, dict[str, Origin]]]:
        """The open files, checked to be all of the network, and where each parameter is in them."""
        library, name = self.model.split(".")
        convert = (
            f'python -c "from {library} import {name} as M; '
            "M.from_pretrained('SOURCE', use_safetensors=False).save_pretrained('DIR')\""
        )
        with weights.opened(self.folder, self.stem, what=self.what, convert=convert) as opened:
            yield opened, self.fit(opened.name, opened.shapes)

    def fit(self, name: str, shapes: Shapes) -> dict[str, Origin]:
        """The origins, if tensors of these shapes are this network; UserError if they are not."""
        target = self.abstract()
        origins = self.origins(target, shapes)
        weights.fit(name, shapes, origins, target, ignored=self.ignored)
        return origins

    def abstract(self) -> dict[str, Any]:
        """The parameters' shapes."""
        return Network(self.config, *self.given).abstract()

    @property
    def files(self) -> list[Path]:
        """The weights."""
        return sorted(self.folder.glob("*.safetensors"))


def write(path: Path, networks: Mapping[str, Published], dtype: str | None = None) -> None:
    """Published weights as one safetensors file of ours, tensor by tensor.

    networks: by what their parameters' paths begin with, "" or such as "autoencoder/". dtype: in
    safetensors' spelling; None is that of each tensor.
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
