"""Image preprocessing: from an image file to the network's input.

Training's evaluation, calibration, `eps-predict` and the server all call
:meth:`Preprocessing.apply`, with the values recorded in the checkpoint and in the bundle's
manifest. Imports no torch: the serving image has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from eps_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

COLORS = ("grey", "rgb")
_MAX_PIXELS = 178_956_970  # of a resized image; Pillow's own limit for decompression bombs
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
FITS = ("crop", "letterbox")

# The gray around a letterboxed image, in every channel, as Ultralytics and Albumentations pad. Not
# the mean of the training images: that depends on the padding, and is measured after it.
PAD_VALUE = 114

_ORIENTATION = 0x0112  # EXIF
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF
_RANGELESS = {"I": "32-bit integers", "F": "floating-point numbers"}

ChooseBox = Callable[[int, int], tuple[int, int, int, int]]
"""Maps height and width of an image to top, left, height and width of a crop, in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """Conversion of an image of any size to uint8 `[C, height, width]`.

    The image is rotated as its EXIF orientation says, converted to `color`, and resized with its
    aspect ratio kept. With `fit` `crop` it just covers `resize`, and is cropped at the centre to
    `crop`. With `letterbox` the whole image just fits into `crop`, which equals `resize`, in the
    centre of pixels of :data:`PAD_VALUE`. Of 16-bit pixels the upper 8 bits are kept. Normalisation
    is part of the exported network, not of this.

    Attributes:
        resize, crop: height and width in pixels.
        color: `grey` or `rgb`.
        interpolation: one of :data:`INTERPOLATIONS`, as Pillow computes it.
        exif_rotation: whether the EXIF orientation is applied.
        fit: one of :data:`FITS`. Not in the representation, which is part of digests that are older
            than this field.
    """

    resize: tuple[int, int]
    crop: tuple[int, int]
    color: str
    interpolation: str = "bilinear"
    exif_rotation: bool = True
    fit: str = field(default="crop", repr=False)

    def __post_init__(self) -> None:
        for name, known in (("color", COLORS), ("interpolation", INTERPOLATIONS), ("fit", FITS)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}"
                )
        if any(not 1 <= c <= r for c, r in zip(self.crop, self.resize, strict=True)):
            raise ConfigError(f"crop {self.crop} must lie within resize {self.resize}")
        if self.fit == "letterbox" and self.crop != self.resize:
            raise ConfigError(f"letterbox: crop {self.crop} must equal resize {self.resize}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape `[C, H, W]` of what :meth:`apply` returns."""
        return (1 if self.color == "grey" else 3, *self.crop)

    @property
    def antialias(self) -> bool:
        """Whether downscaling averages over all source pixels, as Pillow does except for `nearest`.

        Torch needs `antialias=True` for the same pixels; OpenCV's INTER_LINEAR gives others.
        """
        return self.interpolation != "nearest"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for files; without `fit` for `crop`, which readers of version 0.1 imply."""
        fields = {**asdict(self), "resize": list(self.resize), "crop": list(self.crop)}
        if self.fit == "crop":
            del fields["fit"]
        return fields

    def described(self) -> dict[str, Any]:
        """All fields, `antialias` and `pad_value`, for clients that preprocess images themselves.

        `pad_value` is None where nothing is padded.
        """
        pad_value = PAD_VALUE if self.fit == "letterbox" else None
        added = {"fit": self.fit, "antialias": self.antialias, "pad_value": pad_value}
        return {**self.to_dict(), **added}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """Inverse of :meth:`to_dict`. Raises ConfigError for missing or unknown fields."""
        try:
            cls(**fields)  # raises a TypeError for unknown fields, which msgspec ignores
            return msgspec.convert(dict(fields), cls)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"not a preprocessing description: {error}") from None

    def apply(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Return `image` as uint8 `[C, H, W]`.

        Raises ValueError for pixels of 32 bits, whose range is unknown, and for an image too long
        and thin to resize.
        """
        image = self._upright(image)
        height, width = self.scaled(image.height, image.width)
        if height * width > _MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are too long and thin to scale")
        if (width, height) != image.size:
            image = image.resize((width, height), self._resampling)
        if self.fit == "letterbox":
            top, left = (self.crop[0] - height) // 2, (self.crop[1] - width) // 2
            return _planes(self._padded(image, top, left))
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        return _planes(image)

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that :meth:`apply` resizes an image of `height` and `width` to."""
        rows, columns = self.resize
        if self.fit == "letterbox":
            scale = min(rows / height, columns / width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        scale = max(rows / height, columns / width)
        return max(rows, round(height * scale)), max(columns, round(width * scale))

    def apply_crop(self, image: Image.Image, choose: ChooseBox) -> npt.NDArray[np.uint8]:
        """Return the crop that `choose` selects, resized to `crop` regardless of its aspect ratio.

        For training. `choose` receives height and width of the rotated image at full size; with
        `letterbox`, of that image padded to the aspect ratio of `crop`.
        """
        image = self._upright(image)
        rows, columns = image.height, image.width
        if self.fit == "letterbox":
            scale = max(rows / self.crop[0], columns / self.crop[1])
            rows = max(rows, round(self.crop[0] * scale))
            columns = max(columns, round(self.crop[1] * scale))
        above, before = (rows - image.height) // 2, (columns - image.width) // 2
        top, left, height, width = choose(rows, columns)
        # The part of the box that is in the image; its place in the result. The padded image itself
        # is never made: of a long and thin one it would be huge.
        first, last = max(top, above), min(top + height, above + image.height)
        start, end = max(left, before), min(left + width, before + image.width)
        down, across = self.crop[0] / height, self.crop[1] / width
        y, x = round((first - top) * down), round((start - left) * across)
        size = round((end - left) * across) - x, round((last - top) * down) - y
        if min(size) < 1:
            return _planes(self._padded(image.crop((0, 0, 0, 0)), 0, 0))
        inside = image.crop((start - before, first - above, end - before, last - above))
        return _planes(self._padded(inside.resize(size, self._resampling), y, x))

    def read(self, path: Path) -> npt.NDArray[np.uint8]:
        """Read an image file and :meth:`apply`. Raises DataError that names the file."""
        return with_image(path, self.apply)

    def _padded(self, image: Image.Image, top: int, left: int) -> Image.Image:
        """`image` at `top` and `left` of an image of size `crop`."""
        from PIL import Image

        if image.size == self.crop[::-1]:
            return image
        color = PAD_VALUE if image.mode == "L" else (PAD_VALUE,) * 3
        padded = Image.new(image.mode, self.crop[::-1], color)
        padded.paste(image, (left, top))
        return padded

    def _upright(self, image: Image.Image) -> Image.Image:
        from PIL import ImageOps

        reduced = _eight_bits(image)
        if self.exif_rotation:
            reduced = ImageOps.exif_transpose(reduced)
        if reduced.mode == "P" and "transparency" in reduced.info:  # Pillow warns if it drops that
            reduced = reduced.convert("RGBA")
        return reduced.convert("L" if self.color == "grey" else "RGB")

    @property
    def _resampling(self) -> Image.Resampling:
        from PIL import Image

        return Image.Resampling[self.interpolation.upper()]


def with_image(
    path: Path, use: Callable[[Image.Image], T], opened: Callable[[], BinaryIO] | None = None
) -> T:
    """Open an image file and return `use(image)`. Raises DataError that names the file.

    `opened` opens an image that `path` only names, such as a row of a table.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        # Not by its path: Pillow would map some TIFF files into memory and ignore their rotation.
        with opened() if opened else path.open("rb") as file, Image.open(file) as image:
            return use(image)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, not an image") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image that Pillow can read") from None
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        reason = error.strerror if isinstance(error, OSError) else None
        problem = reason or str(error) or type(error).__name__
        raise DataError(f"{path}: cannot be decoded: {problem}") from None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return height and width of an image once its EXIF orientation is applied."""
    turned = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def peak_of_sixteen_bits(image: Image.Image) -> int:
    """Return the largest value, 0..65535, of a 16-bit grey image; 0 for any other image."""
    values = _sixteen_bits(image)
    return 0 if values is None else int(values.max())


def _planes(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return the pixels `[C, H, W]` of a grey or RGB image."""
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return `image` in a mode that Pillow converts to grey or RGB, with its EXIF data.

    Raises ValueError for numbers without a known range, which Pillow would clip to black or white.
    """
    from PIL import Image

    values = _sixteen_bits(image)
    if values is not None:  # Pillow would clip all but the darkest pixels to white
        reduced = Image.fromarray((values >> 8).astype(np.uint8))
        reduced.getexif().update({_ORIENTATION: image.getexif().get(_ORIENTATION, 1)})
        return reduced
    if image.mode in _RANGELESS:
        raise ValueError(
            f"pixels are {_RANGELESS[image.mode]} (Pillow's mode {image.mode}), which have no known"
            " range; save it with 8 or 16 bits"
        )
    return image


def _sixteen_bits(image: Image.Image) -> npt.NDArray[np.uint16] | None:
    """Return the pixels of a 9- to 16-bit grey image, scaled to 0..65535; None for any other."""
    # Pillow scales PGM to 0..65535, whatever its maxval; before 11.3 PNG has the same mode.
    known = image.mode == "I" and image.format in ("PPM", "PNG")
    if not (known or image.mode.startswith("I;16")):
        return None
    values: npt.NDArray[np.uint16] = np.asarray(image).astype(np.uint16)
    tags = getattr(image, "tag_v2", {})  # of TIFF
    if tags.get(_BITS_PER_SAMPLE) == (12,):
        values = (values << 4 | values >> 8).astype(np.uint16)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts images of up to 8 bits only
        values = ~values
    return values
