"""Pictures: uint8 <-> [-1, 1], the pair of resizes that data and sampling share, grids, PNG files.

Low-resolution pictures are made by `downsample` (the mean over square blocks) and seen by a
super-resolution network through `upsample` (bilinear, half-pixel centres). Training and sampling
share both, because a half-pixel shift between them is invisible to the eye and ruins a cascade.
Block means of a crop that starts on the block grid equal the crop of the block means, exactly.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from cascade.errors import UserError
from cascade.storage import paths


def to_float(image: Any) -> Any:
    """uint8 in 0..255 -> float32 in [-1, 1], of the same shape, in NumPy or JAX as it came."""
    return image.astype("float32") / np.float32(127.5) - np.float32(1.0)


def to_uint8(image: Any) -> UInt8[np.ndarray, "*d"]:
    """float in [-1, 1] (values outside are clipped) -> uint8, rounded to the nearest level."""
    image = np.asarray(image, np.float32)
    return np.clip(np.rint((image + 1) * 127.5), 0, 255).astype(np.uint8)


def downsample(image: Any, factor: int) -> Any:
    """float [..., h, w, c] -> [..., h/factor, w/factor, c]: means over factor x factor blocks.

    Raises ValueError unless `factor` divides both sides.
    """
    *lead, h, w, c = image.shape
    if h % factor or w % factor:
        raise ValueError(f"downsample: the sides {h}x{w} must be multiples of factor={factor}")
    blocks = image.reshape(*lead, h // factor, factor, w // factor, factor, c)
    return blocks.mean(axis=(-4, -2))


def upsample(image: Float[Any, "b h w c"], size: tuple[int, int]) -> Any:
    """[b, h, w, c] -> [b, *size, c], bilinear with half-pixel centres (not align_corners)."""
    import jax.image

    b, _, _, c = image.shape
    return jax.image.resize(image, (b, *size, c), "bilinear", antialias=False)


def square(
    image: Image.Image,
    size: int,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
    *,
    at: float = 0.5,
) -> UInt8[np.ndarray, "s s 3"]:
    """Crop a PIL picture to a square, and resize that to `size` pixels, antialiased.

    The square is as large as it can be. at: where it lies along the longer side, in [0, 1] from the
    left or the top; 0.5 is the centre.
    """
    side = min(image.size)
    left, top = int((image.width - side) * at), int((image.height - side) * at)
    box = (left, top, left + side, top + side)
    resized = image.convert("RGB").resize((size, size), resample, box=box)
    return np.asarray(resized)


def upsample_corners(x: Float[Any, "b h w c"], size: tuple[int, int]) -> Any:
    """[b, h, w, c] -> [b, *size, c], bilinear, with the corner pixels where they were.

    Row i of the result lies at row i (h - 1) / (size[0] - 1), and columns likewise: "align_corners"
    in PyTorch's terms. Weights trained on such pictures need it (DeepFloyd IF); jax.image.resize
    aligns edges instead.
    """
    import jax.numpy as jnp

    for axis, n in ((1, size[0]), (2, size[1])):
        m = x.shape[axis]
        # In float32, as the reference has it: its neighbours differ from exact ones at few pixels.
        at = np.arange(n, dtype=np.float32) * np.float32((m - 1) / max(n - 1, 1))
        low = np.minimum(at.astype(int), m - 1)
        share = (at - low).reshape((n,) + (1,) * (x.ndim - axis - 1))
        below = jnp.take(x, low, axis)
        x = below + share * (jnp.take(x, np.minimum(low + 1, m - 1), axis) - below)
    return x


def grid(
    images: Sequence[Any] | np.ndarray, columns: int | None = None, gap: int = 2
) -> np.ndarray:
    """Lay pictures uint8 [h, w, 3] of one size out in one, row by row, `gap` white pixels between.

    columns: pictures in a row; None makes the grid as square as it can be. Raises ValueError for no
    picture.
    """
    if len(images) == 0:
        raise ValueError("grid: needs at least one picture")
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    h, w = images[0].shape[:2]
    canvas = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (h + gap), (i % columns) * (w + gap)
        canvas[y : y + h, x : x + w] = image
    return canvas


def captioned(
    pictures: Sequence[UInt8[np.ndarray, "h w 3"]], captions: Sequence[str]
) -> list[np.ndarray]:
    """Each picture uint8 [h, w, 3] with its caption in black on white under it.

    Long ones are wrapped, and cut after MOST_LINES lines; all results have the height of the
    tallest.
    """
    cells = [_captioned(*pair) for pair in zip(pictures, captions, strict=True)]
    height = max(len(cell) for cell in cells)
    below = [((0, height - len(cell)), (0, 0), (0, 0)) for cell in cells]
    return [np.pad(c, pad, constant_values=255) for c, pad in zip(cells, below, strict=True)]


def _captioned(image: np.ndarray, caption: str) -> np.ndarray:
    h, w = image.shape[:2]
    size = max(10, min(h, w) // 16)
    font = _font(caption, size)
    wrapped = _wrapped(caption[:2000], font, w - 4)
    lines = wrapped if len(wrapped) <= MOST_LINES else [*wrapped[: MOST_LINES - 1], "..."]
    line_height = round(1.2 * size)
    canvas = Image.new("RGB", (w, h + line_height * len(lines) + 4), "white")
    canvas.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((2, h + 2 + line_height * number), line, fill="black", font=font)
    return np.asarray(canvas)


def _font(text: str, size: int) -> Any:
    """The font that a text is written in; matplotlib's where Pillow's lacks letters, as umlauts."""
    if text.isascii():
        return ImageFont.load_default(size)
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """The text in lines of at most so many pixels; a word that is longer is broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line] or [""]


def save_png(
    path: str | os.PathLike[str],
    image: UInt8[np.ndarray, "h w 3"],
    metadata: Mapping[str, str] = {},
) -> None:
    """Write a PNG whose text chunks hold `metadata`; the file appears whole or not at all."""
    info = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    with paths.writing(paths.path(path)) as file:
        Image.fromarray(image).save(file, format="PNG", pnginfo=info)


def rgb(picture: Any, called: str, *, ground: str = "white") -> UInt8[np.ndarray, "h w 3"]:
    """A picture that a person gives: a PIL image, of any kind, or a uint8 array [h, w, 3].

    A PIL image becomes what `decoded` makes of its file; ground: as there. called: the name of the
    option in errors. Raises TypeError for any other value, floats included: whether 1.0 is white or
    hardly anything is not for a program to guess. Raises ValueError for a picture of no pixels.
    """
    if isinstance(picture, Image.Image) and 0 not in picture.size:
        try:
            return np.asarray(_on_ground(_eight_bits(_turned(picture)), ground))
        except Unreadable as e:
            raise TypeError(f"{called}: {e}") from None
    array = np.asarray(picture)
    if array.size == 0:
        raise ValueError(f"{called}: must have pixels, got a picture of none")
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3:
        return array
    raise TypeError(
        f"{called}: must be a PIL image or a uint8 array [h, w, 3] of 0..255, got {_kind(picture)}"
    )


def mask(picture: Any, called: str) -> UInt8[np.ndarray, "h w"]:
    """A mask that a person gives, as grey: what `rgb` takes, or an array [h, w], uint8 or bool.

    True is 255, and what is transparent in a PIL image is 0.
    """
    array = np.asarray(picture) if hasattr(picture, "shape") else None
    if array is not None and array.ndim == 2 and array.dtype in (np.uint8, np.bool_):
        return array.astype(np.uint8) * np.uint8(255 if array.dtype == np.bool_ else 1)
    if array is not None and array.ndim == 2:
        raise TypeError(
            f"{called}: must be a PIL image or an array [h, w], uint8 of 0..255 or bool, got "
            f"{_kind(picture)}"
        )
    return np.asarray(Image.fromarray(rgb(picture, called, ground="black")).convert("L"))


def _kind(given: Any) -> str:
    """What a person gave instead of a picture, and how to make a picture of it."""
    if isinstance(given, (str, os.PathLike)):
        return f"{str(given)!r}: open it with PIL.Image.open"
    if not hasattr(given, "dtype"):
        return f"a value of type {type(given).__name__}"
    got = f"{given.dtype} {list(given.shape)}"
    if np.issubdtype(given.dtype, np.floating):
        return (
            f"{got}: convert it with (255 * x).round().astype(np.uint8) if 1.0 is its white and 0 "
            "its black, with cascade.images.to_uint8(x) if -1 is its black"
        )
    if given.ndim == 4:
        return f"{got}: give a list of its pictures, list(x)"
    if given.dtype == np.uint8:
        return f"{got}: make a PIL image of it with PIL.Image.fromarray"
    return f"{got}: if its values are 0..255, convert it with .astype(np.uint8)"


MOST_LINES = 12
"""Lines of a caption that are shown under a picture."""


class Unreadable(ValueError):
    """A file that cannot be read as a picture; its text says why."""


# Pillow refuses a PNG for a comment or colour profile of 1 MiB; its picture is as good as others.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is read as a picture: formats that Pillow decodes itself, without another program."""
MOST_PIXELS = 2**26
"""Pixels of the largest picture that is read, as 8192 x 8192: 200 MB in RGB."""
MOST_SCANS = 100
"""Times that a progressive JPEG may go over its pixels; encoders make about ten."""


def load_image(path: str | os.PathLike[str], *, ground: str = "white") -> Image.Image:
    """Open a picture file as `decoded` does. Raises UserError unless it is there and a picture."""
    with opened(path) as file:
        return decoded(file, ground=ground)


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Give an open picture file, for `decoded` and `size_of`.

    Raises UserError unless it is there, and where the block raises Unreadable.
    """
    file = paths.path(path)
    paths.check_regular(file)
    try:
        with file.open("rb") as found:
            yield found
    except FileNotFoundError:
        raise UserError(f"picture {path}: no such file; give the path of a PNG or JPEG") from None
    except IsADirectoryError:
        raise UserError(f"picture {path}: is a folder; give the path of a PNG or JPEG") from None
    except (Unreadable, OSError) as e:
        raise UserError(f"picture {path}: cannot be read as an image ({e})") from None


def size_of(file: Any) -> tuple[int, int]:
    """The width and height of an open picture file in pixels, as its head has them.

    They are not yet turned as its EXIF says. Raises Unreadable for what is no picture of FORMATS.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.size
    except UnidentifiedImageError:
        raise Unreadable(f"it is none of {', '.join(FORMATS)}") from None
    except Exception as e:  # each format has its own, for each way to be damaged
        raise Unreadable(" ".join(str(e).split()) or type(e).__name__) from None


def decoded(file: Any, *, ground: str = "white", least: int | None = None) -> Image.Image:
    """Read an open picture file as people see it: in RGB, turned as its EXIF says.

    ground: the colour behind what is transparent. Of 16 bits the upper 8 are kept, of several
    frames the first. least: a JPEG may come at a half, a quarter or an eighth of its size, which
    takes less time, as long as its sides keep so many pixels; None is the whole size. Raises
    Unreadable for what is no picture of FORMATS, is damaged, has pixels of no agreed range, or,
    before they are read, more than MOST_PIXELS of them.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            image.verify()  # the checksums of a PNG, which reading its pixels may never come to
            jpeg = image.format in ("JPEG", "MPO")
        if jpeg and (scans := _scans(file)) > MOST_SCANS:
            raise Unreadable(f"it draws its pixels {scans} times over, and at most {MOST_SCANS}")
        file.seek(0)
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Unreadable(
                    f"it has {image.width} x {image.height} pixels, and at most {MOST_PIXELS} "
                    "are read"
                )
            if least is not None:
                image.draft(None, (least, least))
            image.load()
            white_is_0 = dict(getattr(image, "tag_v2", {})).get(_PHOTOMETRIC) == 0
            if white_is_0 and image.mode.startswith("I"):
                raise Unreadable("its 16-bit levels count from white to black; save it otherwise")
            return _on_ground(_eight_bits(_turned(image)), ground)
    except UnidentifiedImageError:
        raise Unreadable(f"it is none of {', '.join(FORMATS)}") from None
    except Exception as e:  # each format's decoder has its own, for each way to be damaged
        raise Unreadable(" ".join(str(e).split()) or type(e).__name__) from None


def _scans(file: Any) -> int:
    """How often a JPEG goes over its pixels: its markers "start of scan"."""
    file.seek(0)
    found, end = 0, b""
    while part := file.read(2**20):
        found += (end + part).count(b"\xff\xda")
        end = part[-1:]
    return found


def _turned(image: Image.Image) -> Image.Image:
    """The picture as its EXIF says, if that can be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of the metadata: the pixels have been read
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """The picture in a mode of 8 bits a channel, or fewer."""
    if image.mode == "F":
        raise Unreadable("its pixels are floats, whose range nobody knows; save it with 8 bits")
    if image.mode == "I":
        raise Unreadable("its pixels have more than 16 bits; save it with 8 or 16")
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image)
    return Image.fromarray((levels >> 8).astype(np.uint8))


_PHOTOMETRIC = 262
"""The TIFF tag that says whether 0 is white or black."""


def _on_ground(image: Image.Image, ground: str) -> Image.Image:
    """The picture in RGB, with that colour behind what is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    behind = Image.new("RGBA", picture.size, ground)
    return Image.alpha_composite(behind, picture).convert("RGB")
