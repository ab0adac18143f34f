"""A picture in a request: JPEG, PNG or WebP, decoded within limits."""

from __future__ import annotations

import io

from eps_deploy.engines.base import Images
from eps_deploy.serving.refusals import Refusal
from eps_train.preprocess import Preprocessing

FORMATS = ("JPEG", "PNG", "WEBP")


def decode(content: bytes, preprocessing: Preprocessing, max_pixels: int) -> Images:
    """The network's input uint8 `[1, C, H, W]`, as training's evaluation would have it.

    Size and scaled size are known from the picture's header, before a pixel is decoded.

    Raises:
        Refusal: another format, damaged, or more than `max_pixels`, scaled or not.
    """
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise Refusal("the body is empty; send the picture's bytes")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(image.width, image.height, preprocessing, max_pixels)
            return preprocessing.apply(image)[None]
    except Refusal:
        raise
    except UnidentifiedImageError:
        raise Refusal("not a JPEG, PNG or WebP picture; send its bytes as the body") from None
    except Exception as error:  # Pillow's decoders raise many types for what is damaged
        raise Refusal(f"the picture cannot be decoded: {_line(error)}") from None


def _check_size(width: int, height: int, preprocessing: Preprocessing, most: int) -> None:
    if width * height > most:
        raise Refusal(f"the picture has {width} x {height} pixels; at most {most} are accepted")
    for across, down in ((width, height), (height, width)):  # it may lie on its side
        scale = max(preprocessing.resize[0] / down, preprocessing.resize[1] / across)
        if across * scale * down * scale > most:
            raise Refusal(
                f"the picture has {width} x {height} pixels, too long and thin: scaled for the"
                f" network it would have more than the {most} that are accepted"
            )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
