"""One image file: opened, turned upright, laid on a background, cropped to a square and resized, in 8 bits."""

import pathlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from score_jax.errors import UserError

__all__ = ["fit", "open_image", "stored_size"]

T = TypeVar("T")
# Whatever a file's name, no other decoder is tried: that of EPS would start Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def open_image(
    path: pathlib.Path,
    image_size: int | None,
    mode: str = "RGB",
    *,
    crop: int | None = None,
    background: str | None = None,
) -> np.ndarray:
    """An image file as uint8 `[h, w, c]`, upright as its EXIF says, and then as `fit` has it; the first of several.

    Raises:
      UserError: if it cannot be read.
    """

    def decode(image: Image.Image) -> np.ndarray:
        ImageOps.exif_transpose(image, in_place=True)
        return fit(image, image_size, mode, crop, background)

    return _opened(path, decode)


def stored_size(path: pathlib.Path, crop: int | None) -> tuple[int, int]:
    """Width and height of an image file as `open_image` has it without resizing, from its header.

    Raises:
      UserError: if it has no header that can be read.
    """

    def look(image: Image.Image) -> tuple[int, int]:
        width, height = image.size
        # Where its header has none of these, a PNG would be decoded to look for EXIF behind the pixels.
        told = image.info.keys() & {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
        if told and image.getexif().get(0x0112) in (5, 6, 7, 8):  # The orientations of those that lie on their side.
            width, height = height, width
        side = min(crop or 0, width, height)
        return (side, side) if crop else (width, height)

    return _opened(path, look)


def _opened(path: pathlib.Path, fn: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(path, formats=FORMATS) as image:
            return fn(image)
    # Damaged bytes lead Pillow to raise nearly anything: struct.error, KeyError, zlib.error, MemoryError, its bombs.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read the image {path}: {reason}") from error


def fit(
    image: Image.Image, size: int | None, mode: str, crop: int | None = None, background: str | None = None
) -> np.ndarray:
    """A PIL image as uint8 `[h, w, c]`, cropped to its central square and resized, if a size is given.

    Args:
      image: of any size, of 8 or 16 bits.
      size: of the result; None leaves that of the square or, without a crop either, of the image.
      mode: `L` or `RGB`.
      crop: the side of the square; None for the largest, as for one that is too large.
      background: the colour behind what is transparent, by a name that Pillow knows; None for white.

    Raises:
      ValueError: for pixels of 32 bits, which have no range of their own.
    """
    image = _eight_bits(image) if image.mode.startswith(("I", "F")) else image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background or "white"), image)
    image = image.convert(mode)
    if crop or (size is not None and image.size != (size, size)):
        side = min(crop or max(image.size), *image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size or side,) * 2, Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image.height, image.width, -1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as `L`, or `LA` where one grey value is declared transparent."""
    # Pillow's mode `I` has 32 bits, but its PGM files 16, and so have its PNG files before version 11.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError("pixels of 32 bits have no range of their own: save it with 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})  # TIFF's: bits per sample, 12 say, and whether 0 is white.
    most, x = 2 ** tags.get(258, (16,))[0] - 1, np.asarray(image).astype(np.float64)
    opaque = x != image.info.get("transparency", -1)
    x = np.round((most - x if tags.get(262) == 0 else x) * (255 / most)).astype(np.uint8)
    return Image.fromarray(x if opaque.all() else np.stack([x, 255 * opaque.astype(np.uint8)], axis=-1))
