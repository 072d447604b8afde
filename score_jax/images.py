"""Image files: opened, cropped to a square, resized; and a folder of them that may hold a few that cannot be read."""

import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from score_jax.errors import UserError

__all__ = ["SUFFIXES", "Files", "fit", "open_image", "read_images"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Files:
    """Image files by their number.

    One that cannot be read is named, once, and the next one stands for it, so that a batch is the same whenever it is
    read; up to a hundredth of all files, or 10.
    """

    def __init__(self, paths: Sequence[pathlib.Path], image_size: int | None, crop: int | None = None):
        self._paths, self._image_size, self._crop, self._bad = paths, image_size, crop, set[int]()

    def read(self, i: int) -> tuple[np.ndarray, int]:
        """An image, and which it is."""
        try:
            return open_image(self._paths[i], self._image_size, crop=self._crop), i
        except UserError as error:
            if i not in self._bad:
                self._bad.add(i)
                print(f"{error}; skipped", flush=True)
            if len(self._bad) > max(10, len(self._paths) // 100) or len(self._bad) == len(self._paths):
                raise UserError(f"{error}, and so {len(self._bad)} of {len(self._paths)} images: too many") from error
            return self.read((i + 1) % len(self._paths))


def read_images(path: pathlib.Path, shape: tuple[int, int, int]) -> np.ndarray:
    """An image file, or all those of a folder, as uint8 `[n, *shape]`, cropped to a square and resized if need be.

    Raises:
      UserError: if there is no image, or one cannot be read, or has another shape and none of a square is wanted.
    """
    paths = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not paths:
        raise UserError(f"no images ({', '.join(sorted(SUFFIXES))}) in {path}")
    size = shape[0] if shape[0] == shape[1] else None
    images = [open_image(p, size, "L" if shape[-1] == 1 else "RGB") for p in paths]
    for p, image in zip(paths, images, strict=True):
        if image.shape != shape:
            raise UserError(f"the image {p} has shape {image.shape}, and the network's images have {shape}")
    return np.stack(images)


def open_image(path: pathlib.Path, image_size: int | None, mode: str = "RGB", *, crop: int | None = None) -> np.ndarray:
    """An image file as uint8 `[h, w, c]`, as `fit` has it.

    Raises:
      UserError: if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return fit(image, image_size, mode, crop)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:  # Pillow's, by what is damaged.
        raise UserError(f"cannot read the image {path}: {error}") from error


def fit(image: Image.Image, size: int | None, mode: str, crop: int | None = None) -> np.ndarray:
    """A PIL image as uint8 `[h, w, c]`, cropped to its central square and resized, if a size is given.

    Args:
      image: of any size.
      size: of the result; None leaves that of the square or, without a crop either, of the image.
      mode: `L` or `RGB`.
      crop: the side of the square; None for the largest, as for one that is too large.
    """
    image = image.convert(mode)
    if crop or (size is not None and image.size != (size, size)):
        side = min(crop or max(image.size), *image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size or side,) * 2, Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image.height, image.width, -1)
