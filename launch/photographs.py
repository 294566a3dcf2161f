"""Write windows of photographs whose licences are open, to learn from and to look at.

    pip install scikit-image scikit-learn
    python launch/photographs.py photographs

The folder gets train/ and held_out/, windows of 64 px of the photographs at three sizes with a
captions.jsonl (`--data folder:photographs/train`), and whole/, the photographs held out. They are
those that scikit-image and scikit-learn carry:

    train     astronaut (NASA, public domain), coffee (Rachel Michetti, CC0), rocket (SpaceX, public
              domain), hubble_deep_field (NASA, public domain), retina (CC0), flower (vultilion,
              CC BY 2.0)
    held out  chelsea (Stefan van der Walt, CC0), china (danielbuechele, CC BY 2.0)
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN = ("astronaut", "coffee", "rocket", "hubble_deep_field", "retina", "flower")
HELD_OUT = ("chelsea", "china")
SIDE = 64
SHRUNK = (1, 2, 4)
"""By how much, before windows are cut."""
MOST = 240
"""So many windows of a photograph at most, evenly spread, or a large one would outweigh others."""


def photograph(name: str) -> Image.Image:
    """The photograph of that name, at most 1000 pixels wide."""
    from skimage import data
    from sklearn import datasets

    if name in ("flower", "china"):
        picture = Image.fromarray(datasets.load_sample_image(f"{name}.jpg"))
    else:
        picture = Image.fromarray(getattr(data, name)())
    picture.thumbnail((1000, 1000), Image.Resampling.LANCZOS)
    return picture.convert("RGB")


def windows(picture: Image.Image) -> list[np.ndarray]:
    """Windows of the picture at each size, each sharing half with the next, without flat ones."""
    found = []
    for factor in SHRUNK:
        size = picture.width // factor, picture.height // factor
        small = np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
        for y in range(0, small.shape[0] - SIDE + 1, SIDE // 2):
            for x in range(0, small.shape[1] - SIDE + 1, SIDE // 2):
                found.append(small[y : y + SIDE, x : x + SIDE])
    found = [window for window in found if window.std(axis=(0, 1)).max() > 5]
    return [found[i] for i in sorted({round(i) for i in np.linspace(0, len(found) - 1, MOST)})]


def main(out: Path) -> None:
    """Write the folder, which must be new."""
    for part, names in (("train", TRAIN), ("held_out", HELD_OUT)):
        (out / part).mkdir(parents=True)
        lines = []
        for name in names:
            for i, window in enumerate(windows(photograph(name))):
                file = f"{name}_{i:04d}.png"
                Image.fromarray(window).save(out / part / file)
                lines.append(json.dumps({"file": file, "caption": name.replace("_", " ")}))
        (out / part / "captions.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{out / part}: {len(lines)} windows", file=sys.stderr)
    (out / "whole").mkdir()
    for name in HELD_OUT:
        photograph(name).save(out / "whole" / f"{name}.png")


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit("usage: python launch/photographs.py OUT, a folder that does not exist yet")
    main(Path(sys.argv[1]))
