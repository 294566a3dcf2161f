import io

import numpy as np
import pytest
from PIL import Image

from cascade import images
from cascade.errors import UserError

RNG = np.random.default_rng(0)


def test_uint8_survives_the_trip_through_float():
    every_level = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert (images.to_uint8(images.to_float(every_level)) == every_level).all()


def test_values_outside_the_range_are_clipped():
    assert images.to_uint8(np.array([-9.0, 9.0])).tolist() == [0, 255]


def test_downsampling_a_crop_is_cropping_the_downsampled():
    image = RNG.uniform(size=(32, 32, 3)).astype(np.float32)
    crop = images.downsample(image[8:24, 4:20], 4)
    assert np.array_equal(crop, images.downsample(image, 4)[2:6, 1:5])


def test_upsampling_does_not_shift():
    """The centre of mass of a blob stays where it was, in units of the picture's width."""
    y, x = np.mgrid[:16, :16]
    blob = np.exp(-((y - 6.0) ** 2 + (x - 9.0) ** 2) / 4)[None, :, :, None].astype(np.float32)
    large = np.asarray(images.upsample(blob, (64, 64)))

    def centre(a):
        side = a.shape[1]
        at = (np.arange(side) + 0.5) / side
        return (a[0, :, :, 0].sum(1) @ at / a.sum(), a[0, :, :, 0].sum(0) @ at / a.sum())

    assert np.allclose(centre(blob), centre(large), atol=1e-4)


def test_downsampling_undoes_upsampling_of_a_ramp():
    ramp = np.broadcast_to(np.linspace(-1, 1, 8)[None, :, None, None], (1, 8, 8, 1))
    back = images.downsample(images.upsample(ramp.astype(np.float32), (32, 32)), 4)
    assert np.allclose(back[:, 1:-1], ramp[:, 1:-1], atol=1e-5)


def test_grid_places_pictures_row_by_row():
    pictures = [np.full((2, 2, 3), i, np.uint8) for i in range(3)]
    got = images.grid(pictures, columns=2, gap=1)
    assert got.shape == (5, 5, 3)
    assert (got[0, 0, 0], got[0, 3, 0], got[3, 0, 0], got[3, 3, 0]) == (0, 1, 2, 255)


def test_png_round_trip_keeps_pixels_and_metadata(tmp_path):
    image = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    images.save_png(tmp_path / "a.png", image, {"prompt": "ein Kreis, größer"})
    assert np.array_equal(np.asarray(images.load_image(tmp_path / "a.png")), image)
    with Image.open(tmp_path / "a.png") as read:
        assert read.text["prompt"] == "ein Kreis, größer"  # type: ignore[attr-defined]
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_is_turned_as_its_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # its top is on the right
    wide = Image.new("RGB", (16, 8), "white")
    wide.paste("black", (0, 0, 8, 8))
    wide.save(tmp_path / "a.png", exif=exif)
    got = np.asarray(images.load_image(tmp_path / "a.png"))
    assert got.shape == (16, 8, 3) and (got[:8] == 0).all() and (got[8:] == 255).all()


@pytest.mark.parametrize("mode,ink", [("RGBA", (0, 0, 0)), ("LA", (0,)), ("P", None)])
def test_what_is_transparent_is_white(tmp_path, mode, ink):
    picture = Image.new(mode, (2, 1))  # black
    if ink is None:
        picture.putpalette([0, 0, 0, 255, 0, 0])
        picture.putpixel((1, 0), 1)
        picture.save(tmp_path / "a.png", transparency=0)
    else:
        picture.putpixel((1, 0), (*ink, 255))
        picture.save(tmp_path / "a.png")
    got = np.asarray(images.load_image(tmp_path / "a.png"))[0].tolist()
    assert got == [[255, 255, 255], [0, 0, 0] if ink else [255, 0, 0]]


def test_files_that_are_no_pictures_are_refused(tmp_path):
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(UserError, match="cannot be read as an image"):
        images.load_image(tmp_path / "a.png")
    with pytest.raises(UserError, match="no such file"):
        images.load_image(tmp_path / "b.png")


def test_a_scan_is_counted_once_wherever_the_parts_of_a_file_are_read():
    for before in (2**20 - 2, 2**20 - 1, 2**20):
        assert images._scans(io.BytesIO(b"\x00" * before + b"\xff\xda\xff\xd9")) == 1


def test_captions_are_cut_and_lie_right_below_their_pictures(monkeypatch):
    pictures = [np.full((64, 64, 3), level, np.uint8) for level in (10, 20, 30)]
    cells = images.captioned(pictures, ["a", "word " * 10, "word " * 500])
    assert len({cell.shape for cell in cells}) == 1
    for cell, picture in zip(cells, pictures, strict=True):
        np.testing.assert_array_equal(cell[:64, :64], picture)
    inked = [np.flatnonzero((cell[64:] < 128).any((1, 2))) for cell in cells]
    assert inked[0][0] < 16 and inked[0][-1] < inked[1][-1] < inked[2][-1]
    most = (inked[0][-1] + 8) * images.MOST_LINES
    assert len(cells[2]) - 64 < most and (cells[0][64 + 16 :] == 255).all()
    words = "caterpillar " * images.MOST_LINES  # of which none shares a line
    (as_it_is,) = images.captioned(pictures[:1], [words])
    monkeypatch.setattr(images, "MOST_LINES", images.MOST_LINES + 1)
    np.testing.assert_array_equal(as_it_is, images.captioned(pictures[:1], [words])[0])


def test_captions_of_europe_are_written_in_letters():
    """What a font lacks is drawn as one and the same box."""
    blank = [np.full((64, 64, 3), 255, np.uint8)]
    letters = "äöüßéñçłžбдя"
    drawn = {images.captioned(blank, [letter])[0].tobytes() for letter in letters}
    assert len(drawn) == len(letters)


def smooth(mode="RGB", size=(256, 192)):
    levels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_that_comes_smaller_looks_as_if_it_had_been_made_so(mode, orientation):
    """Its sides are no shorter than asked for, whichever way it is turned."""
    exif = Image.Exif()
    exif[274] = orientation
    file = io.BytesIO()
    smooth(mode).save(file, "JPEG", quality=95, exif=exif)
    whole = images.decoded(file)
    for least, half in ((48, (64, 48)), (49, (128, 96)), (97, (256, 192))):
        small = images.decoded(file, least=least)
        assert small.size == (half if orientation == 1 else half[::-1])
        assert min(small.size) >= least
        error = images.square(small, 24).astype(float) - images.square(whole, 24)
        assert np.sqrt((error**2).mean()) < 2
    assert images.size_of(file) == (256, 192)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_other_pictures_come_whole(kind):
    file = io.BytesIO()
    smooth().save(file, kind)
    assert images.decoded(file, least=16).size == (256, 192)


def test_a_square_lies_where_it_is_asked_for():
    wide = Image.fromarray(np.repeat(np.arange(16, dtype=np.uint8)[None], 8, axis=0))
    at = {place: images.square(wide, 8, at=place)[0, :, 0].tolist() for place in (0.0, 0.5, 1.0)}
    assert at == {
        place: list(range(first, first + 8)) for place, first in zip(at, (0, 4, 8), strict=True)
    }
    np.testing.assert_array_equal(images.square(wide, 8), images.square(wide, 8, at=0.5))


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"no picture at all"])
def test_what_is_no_picture_has_no_size(content):
    with pytest.raises(images.Unreadable):
        images.size_of(io.BytesIO(content))
