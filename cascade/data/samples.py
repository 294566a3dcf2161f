"""A folder of `cascade sample` as a dataset: what a model draws, with the prompts as captions.

    0000_64.png  0000_256.png  0000.json {"prompt": ...}

Mixed with pictures of one's own, a model's own pictures keep it from forgetting what it knew
(the prior preservation of Ruiz et al. 2023, "DreamBooth", sec. 3.3).
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re

from cascade.config import read_json
from cascade.data.pictures import Found, PictureData, PictureSource, captions_in, told
from cascade.data.source import BadRecord, Source, hashes_of
from cascade.errors import UserError
from cascade.storage import paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplesData(PictureData):
    """Pictures that `cascade sample` has drawn into a folder, whose captions are their prompts.

    Of each it takes the smallest size that is no smaller than what is trained on.
    """

    path: str
    """The folder, here or in object storage (gs://BUCKET/NAME, s3://BUCKET/NAME)."""

    def open(self, resolution: int) -> Source:
        """The examples in the order of their numbers; see `Data.open`."""
        return _SamplesSource(self, resolution)


class _SamplesSource(PictureSource):
    def __init__(self, config: SamplesData, resolution: int):
        super().__init__(config, resolution)
        self._folder = paths.path(config.path)
        if not self._folder.is_dir():
            raise UserError(
                f"samples {self._folder}: no such folder; give one that `cascade sample` has "
                "written"
            )
        names = {file.name for file in self._folder.iterdir()}
        sides: dict[str, list[int]] = collections.defaultdict(list)
        for name in names:
            if found := re.fullmatch(r"(\d{4,})_(\d{1,6})\.png", name):
                sides[found[1]].append(int(found[2]))
        self._drawn, self.left_out = [], []
        for number, of in sorted(sides.items(), key=lambda item: (int(item[0]), item[0])):
            side = min(of, key=lambda s: (s < resolution, abs(s - resolution)))
            picture = f"{number}_{side}.png"
            if f"{number}.json" in names:
                self._drawn.append((picture, f"{number}.json"))
            else:
                why = (
                    f"picture {self._folder / picture}: has no {number}.json, which has its prompt"
                )
                self.left_out.append(BadRecord(why, picture, "without a caption"))
        if not sides:
            raise UserError(
                f"samples {self._folder}: holds no picture of `cascade sample` (as 0000_64.png); "
                "give a folder that it has written, or folder:PATH for pictures of your own"
            )
        told(self, f"samples {self._folder}")

    def __len__(self) -> int:
        return len(self._drawn)

    def hashes(self):
        return hashes_of(about.removesuffix(".json") for _, about in self._drawn)

    def found(self, index: int) -> Found:
        picture, about = self._drawn[index]
        where = f"picture {self._folder / picture}"
        for name in (picture, about):
            self._check_within(name, where, picture)
        try:
            values = read_json(self._folder / about)
        except UserError as e:
            raise BadRecord(str(e), picture, "whose JSON cannot be read") from None
        prompt = values.get("prompt") if isinstance(values, dict) else None
        captions = captions_in(prompt, f"{where}: {about}", picture)
        return Found(picture, where, self._folder / picture, captions)

    def _check_within(self, name: str, where: str, key: str) -> None:
        file = self._folder / name
        if isinstance(file, pathlib.Path) and file.is_symlink():
            try:
                inside = file.resolve().is_relative_to(pathlib.Path(self._folder).resolve())
            except (OSError, RuntimeError):  # a link to itself leads nowhere
                inside = True
            if not inside:
                raise BadRecord(
                    f"{where}: {name} is a link that leads outside the folder; copy it there",
                    *(key, "link that leads outside"),
                )
