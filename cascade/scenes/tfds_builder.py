"""The scenes as a TensorFlow Datasets dataset: importing this makes tfds.builder("scenes") known.

    import tensorflow_datasets as tfds
    import cascade.scenes.tfds_builder

    builder = tfds.builder("scenes", data_dir="DIR", file_format="array_record")
    builder.download_and_prepare()
    source = builder.as_data_source("train")  # random access, for Grain

Pictures are handed over as PNG bytes and files are ArrayRecord, so TensorFlow is neither needed nor
imported, to write or to read. `cascade data make` does the same from the command line.
"""

import io
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from cascade.devices.terminal import bar
from cascade.scenes.captions import caption_at
from cascade.scenes.render import render
from cascade.scenes.spec import Split


class Scenes(tfds.core.GeneratorBasedBuilder):
    """One to four coloured shapes on a background, with a caption and the facts it asserts."""

    VERSION = tfds.core.Version("2.0.0")

    def __init__(
        self,
        *,
        resolution: int = 64,
        seed: int = 0,
        counts: Mapping[Split, int] | None = None,
        **options: Any,
    ):
        """Example i of a split is scene i of (seed, split).

        resolution: side of the pictures in pixels. counts: examples of each split; None makes
        10 000 of train and 1000 of each other. options: those of every TFDS builder, as data_dir.
        """
        self._resolution, self._seed = resolution, seed
        self._counts = counts or {"train": 10_000, "seen": 1000, "unseen": 1000, "long": 1000}
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(
                {
                    # Without sides, so that a builder with default arguments reads any resolution.
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "facts": tfds.features.Text(doc="JSON of cascade.scenes.captions.Facts"),
                }
            ),
            supervised_keys=("caption", "image"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split, n) for split, n in self._counts.items()}

    def _generate_examples(self, split: Split, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in bar(iterable=range(count), desc=f"scenes, {split}", unit="img"):
            scene, caption = caption_at(self._seed, index, split)
            png = io.BytesIO()
            Image.fromarray(render(scene, self._resolution)).save(png, format="PNG")
            png.seek(0)
            facts = caption.facts.to_json()
            yield index, {"image": png, "caption": caption.text, "facts": facts}
