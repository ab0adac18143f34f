"""Decoding of images: three formats, any size, decompression bombs."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eps_core.preprocessing import Preprocessing
from eps_deploy.serving.protocol import ApiError, decode_image

PREPROCESSING = Preprocessing(resize=(16, 16), crop=(8, 8), color="rgb")
LETTERBOX = Preprocessing(resize=(8, 8), crop=(8, 8), color="rgb", fit="letterbox")
MOST = 100_000


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def refused(content: bytes) -> str:
    with pytest.raises(ApiError) as caught:
        decode_image(content, PREPROCESSING, MOST)
    assert caught.value.status == 400
    return str(caught.value)


@pytest.mark.parametrize("how", [PREPROCESSING, LETTERBOX], ids=lambda how: how.fit)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pixels_equal_those_of_evaluation(kind: str, how: Preprocessing, tmp_path: Path) -> None:
    content = encoded(noise(40, 30), kind)
    (tmp_path / "image").write_bytes(content)
    found = decode_image(content, how, MOST)
    np.testing.assert_array_equal(found[0], how.read(tmp_path / "image"))
    assert found.shape == (1, 3, 8, 8)


def test_exif_rotation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(noise(40, 30), "PNG", exif=exif)
    upright = encoded(noise(40, 30).transpose(Image.Transpose.ROTATE_270), "PNG")
    np.testing.assert_array_equal(
        decode_image(turned, PREPROCESSING, MOST), decode_image(upright, PREPROCESSING, MOST)
    )


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PDF"])
def test_other_formats(kind: str) -> None:
    assert "JPEG, PNG or WebP" in refused(encoded(noise(9, 9), kind))


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", bytes(1000)])
def test_not_an_image(content: bytes) -> None:
    assert refused(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_images(kind: str) -> None:
    """Cut or changed anywhere: an answer, or a refusal that names no address and no path."""
    content = encoded(noise(40, 30), kind)
    draw = np.random.default_rng(0)
    messages = []
    for _ in range(60):
        damaged = bytearray(content)
        for at in draw.integers(0, len(content), 8):
            damaged[at] = draw.integers(256)
        for wrong in (bytes(damaged), content[: draw.integers(len(content))]):
            try:
                decode_image(wrong, PREPROCESSING, MOST)
            except ApiError as error:
                messages.append(str(error))
    assert messages
    assert not any("0x" in message or "/" in message for message in messages), messages


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is this large, and whose pixels are not even there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_rejected_by_its_header() -> None:
    assert "9000 x 9000 pixels; at most 100000" in refused(bomb(9000, 9000))
    assert "decompression bomb" in refused(bomb(30_000, 30_000))  # Pillow's own words
    assert "pixels; at most" in refused(encoded(Image.new("1", (400, 400)), "PNG"))


def test_an_image_too_large_after_scaling() -> None:
    assert "too long and thin" in refused(encoded(Image.new("RGB", (1, 5000)), "PNG"))
    assert "too long and thin" in refused(encoded(Image.new("RGB", (5000, 1)), "PNG"))
    assert decode_image(encoded(Image.new("RGB", (1, 300)), "PNG"), PREPROCESSING, MOST).shape
    assert decode_image(encoded(Image.new("RGB", (1, 5000)), "PNG"), LETTERBOX, MOST).shape
