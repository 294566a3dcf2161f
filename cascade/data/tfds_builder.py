"""Pictures with captions as a TensorFlow Datasets dataset, in ArrayRecord and without TensorFlow.

Importing this makes tfds.builder("pictures") known, which reads what `cascade data convert` wrote.
"""

import io
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds


class Pictures(tfds.core.GeneratorBasedBuilder):
    """Pictures, each with a caption and with columns that say more of it."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, first: Iterable[Any] = (), rest: Iterable[Any] = (), **options: Any):
        """first, rest: what is to be written, with picture, caption and columns, in that order.

        options: those of every TFDS builder, as data_dir.
        """
        self._records = itertools.chain(first, rest)
        self.written = 0
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "caption": tfds.features.Text(),
                    "columns": tfds.features.Text(doc="a JSON object"),
                }
            ),
            supervised_keys=("caption", "image"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for record in self._records:
            columns = json.dumps(record.columns)
            picture = io.BytesIO(record.picture)
            yield self.written, {"image": picture, "caption": record.caption, "columns": columns}
            self.written += 1
