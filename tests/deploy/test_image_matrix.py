"""All kinds of image files: training, eps-predict and the server read the same pixels."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, features

from eps_core.preprocessing import Preprocessing
from eps_deploy.cli import predict
from eps_deploy.serving import protocol
from eps_deploy.serving.protocol import ApiError
from eps_train.data.images import FileSet

Pixels = npt.NDArray[Any]

SIZE = (12, 8)  # upright; no side is the other's multiple
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I", "F")
FORMATS = ("bmp", "gif", "jpeg", "jp2", "pgm", "png", "tga", "tiff", "tiff_lzw", "webp", "avif")
SERVED = ("jpeg", "png", "webp")


def image(mode: str) -> Image.Image:
    """A gradient in each direction, which no turn maps onto itself."""
    rows, columns = np.indices(SIZE)
    grey = (rows * 15 + columns * 4).astype(np.uint8)
    if mode.startswith("I;16"):
        return Image.fromarray(grey.astype(">u2" if mode == "I;16B" else "<u2") << 8)
    if mode in ("I", "F"):
        return Image.fromarray(grey.astype("int32" if mode == "I" else "float32") * 256)
    return Image.fromarray(grey).convert(mode)


def written(mode: str, kind: str, orientation: int) -> bytes | None:
    """The file, or None where that format has no such mode."""
    if mode[0] in "IF" and kind in ("gif", "webp", "avif"):
        return None  # Pillow writes them all white
    exif = Image.Exif()
    exif[0x0112] = orientation
    name, _, compression = kind.partition("_")
    options: dict[str, Any] = {"compression": f"tiff_{compression}"} if compression else {}
    if name == "pgm" and mode == "I;16":  # which Pillow reads, but does not write
        values = np.asarray(image(mode)).astype(">u2").tobytes()
        return b"P5 %d %d 65535\n" % SIZE[::-1] + values
    file = io.BytesIO()
    format_ = {"jp2": "JPEG2000", "pgm": "PPM"}.get(name, name.upper())
    try:
        image(mode).save(file, format_, exif=exif, **options)
    except (OSError, ValueError, KeyError):
        return None
    return file.getvalue()


def trained(path: Path, how: Preprocessing) -> Pixels | str:
    """What training holds in memory."""
    held, found = FileSet.of(path.parent, [path.name], [0], how).scan(keep=True)
    problems = list(found.problems.values())
    return problems[0] if problems else held.images.numpy()[0]


def predicted(path: Path, how: Preprocessing) -> Pixels | str:
    """What eps-predict gives the engine."""
    given: list[Pixels] = []

    def infer(pixels: Pixels) -> Pixels:
        given.append(pixels[0])
        return np.zeros((1, 2), np.float32)

    engine: Any = SimpleNamespace(max_batch=1, infer=infer)
    bundle: Any = SimpleNamespace(preprocessing=how, labels=["a", "b"])
    (answer,) = predict.predict(bundle, engine, [path], 1)
    return given[0] if given else str(answer["error"])


def served(path: Path, how: Preprocessing) -> Pixels | str:
    """What the server makes of the file's bytes."""
    try:
        pixels: Pixels = protocol.decode_image(path.read_bytes(), how, 10**6)
        return np.squeeze(pixels, axis=0)
    except ApiError as refusal:
        return str(refusal)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", MODES)
def test_all_three_see_the_same_pixels_or_refuse_them_by_name(
    mode: str, kind: str, tmp_path: Path
) -> None:
    if kind == "avif" and not features.check("avif"):
        pytest.skip("needs a Pillow with AVIF")
    compared = 0
    for orientation in range(1, 9):
        content = written(mode, kind, orientation)
        if content is None:
            continue
        path = tmp_path / f"{orientation}.{kind.partition('_')[0]}"
        path.write_bytes(content)
        for color, fit in (("grey", "crop"), ("rgb", "crop"), ("rgb", "letterbox")):
            resize = (9, 7) if fit == "crop" else (8, 7)
            how = Preprocessing(resize=resize, crop=(8, 7), color=color, fit=fit)
            ways = [trained(path, how), predicted(path, how)]
            answer = served(path, how)
            if kind in SERVED:
                ways.append(answer)
            else:
                assert answer == "not a JPEG, PNG or WebP image; send its bytes as the body"
            if isinstance(ways[0], str):
                assert mode in ("I", "F"), ways
                assert all("have no known range" in str(way) for way in ways), ways
                continue
            assert all(np.array_equal(ways[0], way) for way in ways[1:])
            compared += 1
            upright = looks(path, mode, orientation, how)
            assert abs(ways[0].astype(int) - upright).mean() <= 6, (orientation, color)
    if mode == "L":
        assert compared, "every format has grey images"


def looks(path: Path, mode: str, orientation: int, how: Preprocessing) -> Pixels:
    """The pixels that one expects, in whole numbers: of the image as 8 bits, turned by numpy."""
    grey = np.asarray(image("L" if mode.startswith("I") else mode).convert("L"))
    with Image.open(path) as opened:
        turned = opened.getexif().get(0x0112, 1)
    assert turned in (1, orientation)
    turns = {
        1: grey,
        2: np.fliplr(grey),
        3: np.rot90(grey, 2),
        4: np.flipud(grey),
        5: grey.T,
        6: np.rot90(grey, -1),
        7: np.rot90(grey, 2).T,
        8: np.rot90(grey, 1),
    }
    return how.apply(Image.fromarray(np.ascontiguousarray(turns[turned]))).astype(int)
