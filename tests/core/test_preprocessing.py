"""Preprocessing of image files of every kind, checked pixel by pixel."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from eps_core.errors import ConfigError, DataError
from eps_core.preprocessing import PAD_VALUE, Preprocessing, with_image

Pixels = npt.NDArray[np.uint8]


def preprocessing(
    resize: tuple[int, int], crop: tuple[int, int] | None = None, **other: Any
) -> Preprocessing:
    fields = {"color": "grey", "interpolation": "nearest", **other}
    return Preprocessing(resize=resize, crop=crop or resize, **fields)


def numbered(height: int, width: int) -> Pixels:
    """Grey pixels, each of its own value: row by row 0, 1, 2, ..."""
    return np.arange(height * width, dtype=np.uint8).reshape(height, width)


def test_shape_and_type() -> None:
    image = Image.fromarray(numbered(5, 9))
    for color, channels in (("grey", 1), ("rgb", 3)):
        how = preprocessing((8, 6), (7, 5), color=color, interpolation="bilinear")
        pixels = how.apply(image)
        assert how.shape == pixels.shape == (channels, 7, 5)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous


def test_an_image_of_the_right_size_is_unchanged() -> None:
    image = Image.fromarray(numbered(4, 6))
    for interpolation in ("nearest", "bilinear", "bicubic", "lanczos"):
        how = preprocessing((4, 6), interpolation=interpolation)
        assert np.array_equal(how.apply(image)[0], numbered(4, 6))


def test_a_wide_image_covers_the_size_and_is_cropped_at_its_centre() -> None:
    # 2x6 doubles to 4x12, the least that covers 4x4; its columns 4..7 were columns 2 and 3.
    found = preprocessing((4, 4)).apply(Image.fromarray(numbered(2, 6)))
    assert found[0].tolist() == [[2, 2, 3, 3], [2, 2, 3, 3], [8, 8, 9, 9], [8, 8, 9, 9]]


def test_a_tall_image_likewise() -> None:
    # 6x2 is the least that covers 2x2 already; rows 2 and 3 are the middle ones.
    found = preprocessing((2, 2)).apply(Image.fromarray(numbered(6, 2)))
    assert found[0].tolist() == [[4, 5], [6, 7]]


def test_height_and_width_are_not_confused() -> None:
    # 4x4 to cover 2x4: it does, and the rows in the middle are kept.
    found = preprocessing((2, 4)).apply(Image.fromarray(numbered(4, 4)))
    assert found[0].tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]


def test_crop_within_the_resized_image() -> None:
    # An odd border of 3 leaves one pixel before and two after.
    found = preprocessing((5, 5), (2, 2)).apply(Image.fromarray(numbered(5, 5)))
    assert found[0].tolist() == [[6, 7], [11, 12]]


def letterbox(*size: int, **other: Any) -> Preprocessing:
    return preprocessing((size[0], size[1]), fit="letterbox", **other)


@pytest.mark.parametrize(
    ("given", "size", "place"),
    [
        ((2, 4), (4, 4), np.s_[1:3, :]),
        ((4, 2), (4, 4), np.s_[:, 1:3]),
        ((2, 4), (5, 4), np.s_[1:3, :]),  # of three rows one is above, two are below
        ((3, 4), (3, 9), np.s_[:, 2:6]),
    ],
)
def test_a_letterboxed_image_is_whole_in_the_middle_of_gray(
    given: tuple[int, int], size: tuple[int, int], place: Any
) -> None:
    expected = np.full(size, PAD_VALUE)
    expected[place] = numbered(*given)
    assert (
        letterbox(*size).apply(Image.fromarray(numbered(*given)))[0].tolist() == expected.tolist()
    )


def test_a_mark_at_the_edge_is_cropped_but_not_letterboxed() -> None:
    pixels = np.zeros((8, 32, 3), dtype=np.uint8)
    pixels[:, :4] = 255, 0, 0
    image = Image.fromarray(pixels)
    cropped = preprocessing((8, 8), color="rgb").apply(image)
    whole = letterbox(8, 8, color="rgb").apply(image)
    assert not cropped.any()
    assert whole[:, 3:5, 0].T.tolist() == [[255, 0, 0]] * 2
    assert whole[:, [2, 5]].min() == whole[:, [2, 5]].max() == PAD_VALUE


def test_however_long_and_thin_an_image_is_a_row_is_left_of_it() -> None:
    found = letterbox(8, 8).apply(Image.new("L", (60_000, 1), 9))
    assert found[0, 3].tolist() == [9] * 8
    assert (found == 9).sum() == 8


def test_letterbox_is_what_torch_makes_with_antialias_and_padding() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 1, 37, 53), dtype=np.uint8)
    how = letterbox(16, 20, interpolation="bilinear")
    rows, columns = how.scaled(37, 53)
    assert (rows, columns) == (14, 20)
    scaled = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).float(), size=(rows, columns), mode="bilinear", antialias=True
    )
    theirs = torch.nn.functional.pad(scaled, (0, 0, 1, 1), value=PAD_VALUE).numpy()
    ours = how.apply(Image.fromarray(pixels[0, 0]))
    assert np.abs(ours - theirs[0]).max() <= 1
    assert how.described()["pad_value"] == PAD_VALUE


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 8, 8), [[114] * 4, [9, 11, 13, 15], [25, 27, 29, 31], [114] * 4]),
        ((0, 4, 4, 4), [[114] * 4, [114] * 4, [4, 5, 6, 7], [12, 13, 14, 15]]),
        ((0, 0, 2, 8), [[114] * 4] * 4),
    ],
)
def test_a_crop_of_a_letterboxed_image_is_of_the_padded_one(
    box: tuple[int, int, int, int], expected: list[list[int]]
) -> None:
    told = []

    def choose(height: int, width: int) -> tuple[int, int, int, int]:
        told.append((height, width))
        return box

    # 4x8 pixels, with two gray rows above and below; `nearest` takes odd rows and columns.
    image = Image.fromarray(np.arange(32, dtype=np.uint8).reshape(4, 8))
    found = letterbox(4, 4).apply_crop(image, choose)
    assert told == [(8, 8)]
    assert found[0].tolist() == expected


def test_averaging_when_shrinking_is_smooth() -> None:
    checkers = np.indices((8, 8)).sum(axis=0) % 2 * 255
    found = preprocessing((2, 2), interpolation="bilinear").apply(
        Image.fromarray(checkers.astype(np.uint8))
    )
    assert abs(found.astype(int) - 127).max() <= 2, "no pixel is picked alone"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_antialias_tells_how_torch_gets_the_same_pixels(interpolation: str) -> None:
    """A client that prepares images with torch gets the same pixels, and only with antialias."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 1, 37, 53), dtype=np.uint8)
    cut = preprocessing((9, 13), interpolation=interpolation)

    def difference(antialias: bool) -> float:
        theirs = torch.nn.functional.interpolate(
            torch.from_numpy(pixels).float(),
            size=(9, 13),
            mode=interpolation,
            antialias=antialias,
        )
        ours = cut.apply(Image.fromarray(pixels[0, 0])).astype(float)
        return float(np.abs(ours - theirs.clamp(0, 255).numpy()[0]).max())

    assert cut.described()["antialias"]
    assert difference(antialias=True) <= 1
    assert difference(antialias=False) > 20
    assert not preprocessing((9, 13), interpolation="nearest").antialias


ORIENTATIONS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda upright: np.rot90(upright, 1),  # stored so that a quarter turn clockwise rights it
    7: lambda upright: np.rot90(upright, 2).T,
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    upright = numbered(3, 2)
    stored = Image.fromarray(np.ascontiguousarray(ORIENTATIONS[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    stored.save(path, exif=exif)
    assert np.array_equal(preprocessing((3, 2)).read(path)[0], upright)
    as_stored = preprocessing((stored.height, stored.width), exif_rotation=False)
    assert np.array_equal(as_stored.read(path)[0], np.asarray(stored))


def test_colours_by_mode(tmp_path: Path) -> None:
    red = (200, 30, 60)
    grey = Image.new("RGB", (1, 1), red).convert("L").getpixel((0, 0))
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, *red])
    transparent = palette.copy()
    transparent.info["transparency"] = b"\xff\x80"
    images = {
        "rgb": Image.new("RGB", (2, 2), red),
        "alpha": Image.new("RGBA", (2, 2), (*red, 128)),
        "palette": palette,
        "transparent palette": transparent,
    }
    for name, image in images.items():
        path = tmp_path / f"{name}.png"
        image.save(path)
        for color, expected in (("rgb", list(red)), ("grey", [grey])):
            pixels = preprocessing((2, 2), color=color).read(path)
            assert pixels[:, 1, 0].tolist() == expected, (name, color)


def test_grey_and_black_and_white_become_rgb(tmp_path: Path) -> None:
    for mode, value, expected in (("L", 77, 77), ("LA", (77, 9), 77), ("1", 1, 255)):
        path = tmp_path / f"{mode}.png"
        Image.new(mode, (2, 2), value).save(path)
        assert preprocessing((2, 2), color="rgb").read(path)[:, 0, 0].tolist() == [expected] * 3


def test_sixteen_bits_keep_their_brightness(tmp_path: Path) -> None:
    deep = np.array([[0, 255, 256], [0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for color in ("grey", "rgb"):
        found = preprocessing((2, 3), color=color).read(tmp_path / "deep.png")
        assert all(channel.tolist() == [[0, 0, 1], [0x12, 0x80, 0xFF]] for channel in found)


@pytest.mark.parametrize("maxval", [255, 4095, 65535])
def test_pgm_of_every_depth_keeps_its_brightness(maxval: int, tmp_path: Path) -> None:
    kind = ">u2" if maxval > 255 else "u1"
    values = (np.linspace(0, maxval, 6).round()).astype(kind)
    (tmp_path / "x.pgm").write_bytes(b"P5 3 2 %d\n" % maxval + values.tobytes())
    found = preprocessing((2, 3)).read(tmp_path / "x.pgm").ravel().astype(int)
    assert abs(found - np.linspace(0, 255, 6)).max() <= 1


@pytest.mark.parametrize(
    ("bits", "photometric", "expected"),
    [(16, 1, [0x12, 0x80]), (16, 0, [0xED, 0x7F]), (12, 1, [0x12, 0x80])],
)
def test_tiff_of_12_and_16_bits_keeps_its_brightness(
    bits: int, photometric: int, expected: list[int], tmp_path: Path
) -> None:
    """Also where 0 is white, and where three bytes hold two pixels."""
    data = b"\x34\x12\x00\x80" if bits == 16 else b"\x12\x38\x00"  # 0x1234 0x8000; 0x123 0x800
    tags = [
        (256, 3, 2),  # width, height, bits, no compression, photometric, offset, rows, bytes
        (257, 3, 1),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, 1),
        (279, 4, len(data)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"
    path = tmp_path / "x.tif"
    path.write_bytes(b"II*\0" + struct.pack("<I", 12) + data.ljust(4, b"\0") + directory)
    assert preprocessing((1, 2)).read(path).ravel().tolist() == expected


@pytest.mark.parametrize(
    ("kind", "problem"),
    [("float32", "floating-point numbers"), ("int32", "32-bit integers")],
)
def test_pixels_without_a_known_range_are_refused_by_name(
    kind: str, problem: str, tmp_path: Path
) -> None:
    Image.fromarray(np.ones((2, 3), kind)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=rf"x\.tif: cannot be decoded: pixels are {problem}"):
        preprocessing((2, 3)).read(tmp_path / "x.tif")


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("mode", ["L", "P", "I;16", "RGB", "RGBA", "CMYK"])
def test_an_uncompressed_tiff_is_rotated_in_every_mode(
    mode: str, orientation: int, tmp_path: Path
) -> None:
    """By its path, Pillow maps such a file into memory, and gives it back as it is stored."""
    upright = numbered(3, 2) * 40
    stored = np.ascontiguousarray(ORIENTATIONS[orientation](upright))
    deep = Image.fromarray(stored.astype(np.uint16) << 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = deep if mode == "I;16" else Image.fromarray(stored).convert(mode)
    image.save(tmp_path / "x.tif", exif=exif)
    found = preprocessing((3, 2)).read(tmp_path / "x.tif")[0].astype(int)
    assert abs(found - upright).max() <= 1


def test_a_crop_is_chosen_in_the_rotated_image_and_resized(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise rights it
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    told = []

    def choose(height: int, width: int) -> tuple[int, int, int, int]:
        told.append((height, width))
        return 4, 7, 21, 14

    how = preprocessing((12, 10), (8, 6), color="rgb", interpolation="bilinear")
    found = with_image(tmp_path / "photo.png", partial(how.apply_crop, choose=choose))
    assert told == [(40, 30)]
    part = Image.fromarray(np.ascontiguousarray(np.rot90(pixels, -1)[4:25, 7:21]))
    expected = np.asarray(part.resize((6, 8), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(found, expected)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (200, 30, 60)).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    found = preprocessing((4, 4), color="rgb").read(tmp_path / "print.jpg")[:, 1, 1].tolist()
    assert all(abs(a - b) <= 2 for a, b in zip(found, (200, 30, 60), strict=True)), found


def test_round_trip_through_plain_data() -> None:
    how = preprocessing((9, 7), (8, 6), color="rgb", interpolation="lanczos", exif_rotation=False)
    assert Preprocessing.from_dict(how.to_dict()) == how
    assert how.to_dict()["crop"] == [8, 6]
    assert "fit" not in how.to_dict(), "earlier versions read it"
    assert how.described()["fit"] == "crop"
    assert how.described()["pad_value"] is None
    boxed = letterbox(9, 7)
    assert boxed.to_dict()["fit"] == "letterbox"
    assert Preprocessing.from_dict(boxed.to_dict()) == boxed != preprocessing((9, 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"color": "cmyk"}, "color 'cmyk' is not one of grey, rgb"),
        ({"interpolation": "cubic"}, "interpolation 'cubic' is not one of nearest, "),
        ({"crop": (5, 4)}, "crop .* must lie within resize"),
        ({"crop": (0, 4)}, "crop .* must lie within resize"),
        ({"fit": "squash"}, "fit 'squash' is not one of crop, letterbox"),
        ({"fit": "letterbox", "crop": (3, 4)}, "letterbox: crop .* must equal resize"),
    ],
)
def test_impossible_descriptions(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preprocessing(**{"resize": (4, 4), "crop": (4, 4), "color": "grey", **change})


@pytest.mark.parametrize(
    "change", [{"crop": [4]}, {"crop": None}, {"crop": ["a", "b"]}, {"mirror": True}]
)
def test_unusable_descriptions(change: dict[str, Any]) -> None:
    fields = preprocessing((4, 4)).to_dict()
    with pytest.raises(ConfigError, match="not a preprocessing description"):
        Preprocessing.from_dict({**fields, **change})
    with pytest.raises(ConfigError, match="not a preprocessing description"):
        Preprocessing.from_dict({"color": "grey"})


def test_files_that_are_no_images(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    empty = tmp_path / "empty.png"
    empty.touch()
    expected = {
        text: "not an image",
        empty: "not an image",
        tmp_path: "is a folder",
        tmp_path / "missing.png": "no such file",
    }
    for path, message in expected.items():
        with pytest.raises(DataError, match=message) as error:
            preprocessing((4, 4)).read(path)
        assert str(error.value).startswith(f"{path}: ")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags
@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "tiff", "bmp", "webp"])
def test_damaged_images_are_decoded_or_named(ending: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / f"photo.{ending}"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    how, refused, decoded = preprocessing((8, 8)), 0, 0
    for attempt in range(40):
        content = bytearray(whole)
        if attempt % 2:
            del content[rng.randrange(len(content)) :]
        else:
            content[rng.randrange(min(64, len(content)))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            pixels = how.read(path)
        except DataError as error:
            message = str(error)
            refused += message.startswith(f"{path}: ")
        else:
            assert pixels.shape == (1, 8, 8)
            decoded += 1
    assert refused + decoded == 40
    assert refused >= 10


def test_a_very_thin_image_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    """The header of a PNG file says how large it is; a whole one takes ten seconds to write."""
    Image.new("1", (1, 1)).save(tmp_path / "thread.png")
    content = bytearray((tmp_path / "thread.png").read_bytes())
    content[20:24] = (60_000_000).to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "thread.png").write_bytes(content)
    with pytest.raises(DataError, match=r"thread\.png: .* 1x60000000 pixels are too long and thin"):
        preprocessing((8, 8)).read(tmp_path / "thread.png")


@pytest.mark.parametrize("error", [EOFError, MemoryError, IndexError("odd")])
def test_whatever_a_decoder_raises_names_the_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise error

    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", broken)
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded: \w+"):
        preprocessing((8, 8), interpolation="bilinear").read(tmp_path / "a.png")
