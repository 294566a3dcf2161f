"""Reads pictures of scenes back: what is on the background, and where.

It is analysis only, with nothing learned and no prompt in sight. A picture is first averaged over
the periods of the finishes, which takes them away and leaves 64 x 64 pixels whatever its size:

1. the background is the palette colour nearest to the median of the frame;
2. objects are connected regions that differ from it; a region's colour is its palette label in the
   flat places, since outlines are blends; another colour inside a region is an object held by it;
3. how much of each pixel an object covers follows from the blend of its two colours. Area and
   centroid of that give, for every shape in turn, the one radius and centre that it could have;
   the shape is the one that covers best what is covered (intersection over union);
4. finishes are read at 256 pixels, where a period is 4: from its two-dimensional spectrum in the
   pixels of step 3 that are wholly covered, whose periods are whole.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage

from cascade.scenes import spec
from cascade.scenes.render import BACKGROUNDS, COLOURS, PERIODS, coverage, finish_pattern, tones
from cascade.scenes.spec import Background, Colour, Finish, Shape, Size

SIDES = (64, 256, 1024)
FINISH_SIDE = 256  # finishes are read in pictures of this side and more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """One object as read. Lengths are in units of the picture's width, as in spec.Object."""

    shape: Shape | None
    """The shape that covers it best; None if none covers it well."""
    colour: Colour
    """The nearest colour of the palette."""
    size: Size
    """The size that the radius is nearer to."""
    finish: Finish | None
    """The finish; None if the picture is too small to show it."""
    x: float
    """The centre's distance from the left edge."""
    y: float
    """The centre's distance from the upper edge."""
    radius: float
    """The radius that its area gives the shape."""
    match: float
    """Intersection over union with the best shape, in [0, 1]; 1 is perfect."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What a picture shows."""

    background: Background
    """The nearest background of the palette."""
    objects: tuple[Seen, ...]
    """The objects, in no particular order."""
    finishes: bool
    """Whether the picture is large enough to show finishes."""


def read(picture: UInt8[np.ndarray, "s s 3"]) -> Reading:
    """Read what a picture of 64, 256 or 1024 pixels squared shows.

    Raises ValueError for other sides.
    """
    side = len(picture)
    if side not in SIDES:
        raise ValueError(f"a picture to read must have a side of 64, 256 or 1024, got {side}")
    fine = _averaged(picture, FINISH_SIDE) if side >= FINISH_SIDE else None
    small = _averaged(picture if fine is None else fine, PERIODS)
    frame = np.concatenate([small[0], small[-1], small[1:-1, 0], small[1:-1, -1]])
    ground = np.median(frame, axis=0)
    background = list(BACKGROUNDS)[int(_nearest(ground, _GROUNDS))]
    found = _Picture(small, fine).objects(ground)
    return Reading(background=background, objects=tuple(found), finishes=fine is not None)


# Colour distance (RGB, Euclidean) from which a pixel is no longer the ground: half the least
# distance in the palette.
_CONTRAST = 40.0
_FLAT = 20.0  # change of colour a pixel, beyond which a place is not flat
_LEAST_AREA = 18  # of an object in pixels: a third of the smallest drawn
_LEAST_MATCH = 0.6
_FAINT = 0.12  # strength of a finish's spectrum, below which it is none; drawn ones have 0.5 to 0.7
_BIG = (spec.SMALL[1] + spec.BIG[0]) / 2
_AROUND = np.ones((3, 3), bool)
_PALETTE = np.array(list(COLOURS.values()), np.float32)
_GROUNDS = np.array(list(BACKGROUNDS.values()), np.float32)


class _Picture:
    """The working arrays of one picture: pixels, their palette labels, and where it is flat."""

    def __init__(self, small: Float[np.ndarray, "h w 3"], fine: Float[np.ndarray, "s s 3"] | None):
        self.small, self.fine = small, fine
        self.labels: Int[np.ndarray, "h w"] = _nearest(small, _PALETTE)
        # Central differences: zero on the crest of a thin ring, too, unlike one-sided ones.
        slope = [ndimage.correlate1d(small, [-0.5, 0.0, 0.5], axis=axis) for axis in (0, 1)]
        self.flatness = 1 / (1 + sum((s * s).sum(-1) for s in slope) / _FLAT**2)

    def objects(self, ground: Float[np.ndarray, "3"]) -> list[Seen]:
        """All objects on a background of this colour."""
        # Ground is never one pixel wide; but where two colours meet, their blend can look like it.
        empty = _thick(_distance(self.small, ground) <= _CONTRAST)
        return [seen for region in _regions(~empty) for seen in self._region(region, ground)]

    def _region(
        self, region: Bool[np.ndarray, "h w"], ground: Float[np.ndarray, "3"], depth: int = 0
    ) -> list[Seen]:
        """The object whose colour prevails in a region, and those of other colours in it."""
        weights = self.flatness * region
        number = np.bincount(self.labels.ravel(), weights.ravel(), len(_PALETTE)).argmax()
        weights = weights * (self.labels == number)
        colour = np.einsum("hw,hwc->c", weights, self.small) / weights.sum()
        # How much of a pixel the object covers: its place between the ground and the colour.
        step = colour - ground
        share = np.clip((self.small - ground) @ step / (step @ step), 0, 1)
        share *= _grown(region)
        whole = share > 0.97
        others = []
        if depth == 0:
            inside = ~_grown(~region)
            for part in _regions(_thick(inside & (_distance(self.small, colour) > _CONTRAST))):
                halo = _grown(part, 2)
                # Held where the first colour goes all around it; else it only touches.
                held = (halo & ~region).sum() < 0.25 * (halo & ~part).sum()
                share[halo] = 1.0 if held else 0.0
                whole &= ~halo
                others += self._region(part, colour if held else ground, depth=1)
        if share.sum() < _LEAST_AREA / 2:
            return others
        name = list(COLOURS)[int(number)]
        # What is thin and blurred nowhere reaches its full colour, and covers less than it seems.
        full = _PALETTE[number] - ground
        reached = float(step @ full / (full @ full))
        seen = _best_shape(share, name)
        if 0.5 < reached < 0.97:
            seen = max(seen, _best_shape(reached * share, name), key=lambda one: one.match)
        if self.fine is not None:
            seen = dataclasses.replace(seen, finish=_finish(self.fine, whole, name))
        return [seen, *others]


def _best_shape(share: Float[np.ndarray, "h w"], colour: Colour) -> Seen:
    side = len(share)
    rows, columns = (np.flatnonzero(share.any(axis)) for axis in (1, 0))
    window = [(max(int(i[0]) - 2, 0), min(int(i[-1]) + 3, side)) for i in (rows, columns)]
    share = share[slice(*window[0]), slice(*window[1])]
    area = float(share.sum())
    y = float(share.sum(1) @ (np.arange(*window[0]) + 0.5)) / area
    x = float(share.sum(0) @ (np.arange(*window[1]) + 0.5)) / area
    fits: list[tuple[float, spec.Object]] = []
    for shape, (unit_area, offset) in _moments().items():
        radius = (area / unit_area) ** 0.5
        item = spec.Object(
            shape=shape,
            colour=colour,
            size="big" if radius / side > _BIG else "small",
            finish="plain",
            x=x / side,
            y=(y - offset * radius) / side,
            radius=radius / side,
        )
        covered = coverage(item, side, window[0], window[1])
        fits.append((np.minimum(share, covered).sum() / np.maximum(share, covered).sum(), item))
    match, item = max(fits, key=lambda fit: fit[0])
    return Seen(
        shape=item.shape if match >= _LEAST_MATCH else None,
        colour=colour,
        size=item.size,
        finish=None,
        x=item.x,
        y=item.y,
        radius=item.radius,
        match=float(match),
    )


@functools.cache
def _moments() -> dict[Shape, tuple[float, float]]:
    """Area, in squared radii, and how far the centroid lies below the centre, in radii."""
    side, radius = 256, 0.4
    found = {}
    for shape in spec.SHAPES:
        item = spec.Object(
            shape=shape, colour="red", size="big", finish="plain", x=0.5, y=0.5, radius=radius
        )
        covered = coverage(item, side, (0, side), (0, side))
        area = float(covered.sum())
        centroid = float(covered.sum(1) @ (np.arange(side) + 0.5)) / area
        found[shape] = (area / (radius * side) ** 2, (centroid / side - 0.5) / radius)
    return found


def _finish(
    fine: Float[np.ndarray, "s s 3"], whole: Bool[np.ndarray, "h w"], colour: Colour
) -> Finish:
    """The finish whose spectrum has the form of that of the periods marked in `whole`."""
    period = FINISH_SIDE // PERIODS
    if not whole.any():
        return "plain"
    cells = fine.reshape(PERIODS, period, PERIODS, period, 3).transpose(0, 2, 1, 3, 4)[whole]
    _, swing = tones(colour)
    pattern = (cells - cells.mean(axis=(1, 2), keepdims=True)) @ swing / (swing @ swing)
    # The median stands above cells that an outline still touches.
    spectrum = np.median(_spectrum(pattern), axis=0)
    strength = float(np.linalg.norm(spectrum))
    if strength < _FAINT:
        return "plain"
    return max(_forms(), key=lambda finish: float(_forms()[finish] @ spectrum))


def _spectrum(cells: Float[np.ndarray, "*n p p"]) -> Float[np.ndarray, "*n 3"]:
    """How strongly each period varies along one axis, along the other, and along both."""
    f = np.abs(np.fft.fft2(cells)) / cells.shape[-1] ** 2
    along = f[..., 1, 0], f[..., 0, 1]
    both = np.hypot(f[..., 1, 1], f[..., 1, -1])
    return np.stack([np.maximum(*along), np.minimum(*along), both], axis=-1)


@functools.cache
def _forms() -> dict[Finish, Float[np.ndarray, "3"]]:
    """The spectra of the finishes, of length 1: blur weakens one but hardly changes its form."""
    period = FINISH_SIDE // PERIODS
    forms: dict[Finish, np.ndarray] = {}
    for finish in spec.FINISHES:
        if finish != "plain":
            spectrum = _spectrum(finish_pattern(finish, FINISH_SIDE)[:period, :period])
            forms[finish] = spectrum / np.linalg.norm(spectrum)
    return forms


def _regions(mask: Bool[np.ndarray, "h w"]) -> list[Bool[np.ndarray, "h w"]]:
    """The connected parts that are large enough to be objects, diagonal neighbours included."""
    numbers, _ = ndimage.label(mask, _AROUND)  # type: ignore[misc]
    areas = np.bincount(numbers.ravel())
    return [numbers == n for n in range(1, len(areas)) if areas[n] >= _LEAST_AREA]


def _grown(mask: Bool[np.ndarray, "h w"], by: int = 1) -> Bool[np.ndarray, "h w"]:
    return np.asarray(ndimage.binary_dilation(mask, _AROUND, iterations=by))


def _thick(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The mask without what is less than two pixels wide."""
    return np.asarray(ndimage.binary_opening(mask, np.ones((2, 2))))


def _averaged(picture: np.ndarray, side: int) -> Float[np.ndarray, "side side 3"]:
    # Sums of slices: ten times as fast as .sum() over the short axes of a reshaped array.
    f = len(picture) // side
    rows = sum((picture[i::f] for i in range(1, f)), start=picture[::f].astype(np.float32))
    return sum((rows[:, i::f] for i in range(1, f)), start=rows[:, ::f]) / np.float32(f * f)


def _nearest(colours: Float[np.ndarray, "*d 3"], palette: Float[np.ndarray, "n 3"]):
    # |c - p|^2 without |c|^2, which is the same for every p.
    return ((palette**2).sum(-1) - 2 * colours @ palette.T).argmin(-1)


def _distance(picture: Float[np.ndarray, "h w 3"], colour: np.ndarray) -> np.ndarray:
    difference = picture - colour
    return np.sqrt((difference * difference).sum(-1))
