"""Data sets, and the pipeline that feeds them to training.

A data set is random access to raw examples.  The pipeline shuffles the indices anew in each
epoch, from a seed, and reads a batch at a time, or the rows of it that one process of several
needs.  Batch k is a function of (seed, k) alone and grain counts k, so the pipeline's state is
one number, and training resumes at the very batch where it stopped, on any number of processes.
Images stay uint8 up to the device, where `augment` makes floats of them.  TensorFlow is never
imported.

A data set is a function `f(split, *, data_dir, image_size, crop, background)` of this module; any other
name is an image data set of tensorflow-datasets, prepared beforehand by `prepare`:

    python -m score_jax.data cifar10 --data_dir=DIR
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image, ImageColor

from score_jax.errors import UserError, nearest
from score_jax.files import Files, open_split
from score_jax.images import fit
from score_jax.prepare import open_source, prepare

__all__ = ["checkerboard", "digits", "folder", "two_moons"]

SPLITS = ("train", "test")
Images = TypeVar("Images", np.ndarray, Array)


class Dataset(NamedTuple):
    """Random access to examples.

    Attributes:
      size: the number of examples.
      shape: the shape of one example, `(h, w, c)` or `(d,)`.
      read: `read(indices [b]) -> (x, y)`: uint8 images `[b, h, w, c]` or float32 vectors
        `[b, d]`, and int32 labels `[b]` (zeros where there are none).
      undivided: whether the other split is of the same examples.
      num_classes: labels are 0 ... num_classes - 1; 0 where there are none.
      class_names: the name of each class.
    """

    size: int
    shape: tuple[int, ...]
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    undivided: bool = False
    num_classes: int = 0
    class_names: tuple[str, ...] = ()


def load(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    image_size: int | None = None,
    crop: int | None = None,
    background: str | None = None,
) -> Dataset:
    """Open a data set by its name.

    Args:
      name: a function of this module, or an image data set of tensorflow-datasets.
      split: `train` or `test`.
      data_dir: where files lie; None for the default of tensorflow-datasets.
      image_size: images are cropped to a square and resized to this; None leaves them alone.
      crop: the side of that square, in the middle; None for the largest.
      background: the colour behind transparent pixels, by a name that Pillow knows; None for white.

    Raises:
      UserError: if there is no such data set, or it is not on disk, or no such colour.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}{nearest(split, SPLITS)}")
    try:
        ImageColor.getrgb(background or "white")
    except ValueError as error:
        raise UserError(f"config.data.background: {error}; 'black' and '#808080' are colours, say") from error
    build = globals()[name] if name in __all__ else functools.partial(_tfds, name)
    return build(split, data_dir=data_dir, image_size=image_size, crop=crop, background=background)


def labelled(dataset: Dataset, num_classes: int, what: str) -> Dataset:
    """The data set for a network of classes: that its labels are of these is checked, and again as they are read.

    Args:
      dataset: the data.
      num_classes: which the network takes, `config.network.num_classes`.
      what: the data, in the words of an error.

    Raises:
      UserError: if there are more classes in the data, or none at all.
    """
    takes = f"the network takes config.network.num_classes={num_classes} classes"
    if not dataset.num_classes:
        raise UserError(f"{takes}, and {what} has none")
    if dataset.num_classes > num_classes:
        beyond = ", ".join(map(repr, dataset.class_names[num_classes:][:3]))
        raise UserError(
            f"{takes}, and {what} has {dataset.num_classes}, beyond them {beyond}: set config.network.num_classes to "
            f"{dataset.num_classes}, or leave classes out of the data"
        )

    def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = dataset.read(indices)
        for label in y[(y < 0) | (y >= num_classes)][:1]:
            raise UserError(f"{takes}, 0 to {num_classes - 1}, and {what} has an example of the label {label}")
        return x, y

    return dataset._replace(read=read)


def _from_arrays(x: np.ndarray, y: np.ndarray, class_names: Sequence[str]) -> Dataset:
    def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return x[indices], y[indices].astype(np.int32)

    return Dataset(len(x), x.shape[1:], read, num_classes=len(class_names), class_names=tuple(class_names))


def digits(split: str, *, image_size: int | None = None, crop: int | None = None, **_: object) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 in 17 grey levels: 1,437 to train on, 360 to test."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = np.round(x.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    if image_size not in (None, 8) or crop:
        images = np.stack([fit(Image.fromarray(image[..., 0]), image_size, "L", crop) for image in images])
    order = np.random.default_rng(0).permutation(len(images))
    order = order[:1437] if split == "train" else order[1437:]
    return _from_arrays(images[order], y[order], "0123456789")


def two_moons(split: str, **_: object) -> Dataset:
    """Two interleaved half circles with Gaussian noise 0.1, of about unit variance; the label is the moon."""
    rng = np.random.default_rng(SPLITS.index(split))
    y = rng.integers(0, 2, 50_000)
    angle = rng.uniform(0, np.pi, y.shape)
    x = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=1) * np.where(y, -1, 1)[:, None]
    return _from_arrays((x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32), y, ("upper", "lower"))


def checkerboard(split: str, **_: object) -> Dataset:
    """Uniform on the eight dark fields of a 4x4 board over [-2, 2]^2; the label is the field's column."""
    rng = np.random.default_rng(SPLITS.index(split))
    column = rng.integers(0, 4, 50_000)
    row = 2 * rng.integers(0, 2, column.shape) + column % 2
    x = np.stack([column, row], axis=1) + rng.uniform(size=(len(column), 2)) - 2
    return _from_arrays(x.astype(np.float32), column, "0123")


def folder(
    split: str,
    *,
    data_dir: str | None = None,
    image_size: int | None = None,
    crop: int | None = None,
    background: str | None = None,
) -> Dataset:
    """A folder of RGB images: in `data_dir/train` and `/test` (or `/val`, `/validation`), or in `data_dir` itself.

    Where it is not divided both splits are all images, and that is printed.  The first subfolder on the way to an image
    is its class: those of the train split are numbered in alphabetical order, and what the test split alone has comes
    after them.  A few images that cannot be read are named and skipped.

    Raises:
      UserError: if the folder is missing or empty, or has the other split alone, or images differ in size and
        `image_size` is None.
    """
    if data_dir is None:
        raise UserError("the data set 'folder' needs config.data.dir, a directory of images")
    paths, y, names, undivided = open_split(data_dir, split)
    files = Files(paths, image_size, crop, background)

    def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, found = zip(*(files.read(int(i)) for i in indices), strict=True)
        return np.stack(images), y[list(found)]

    return Dataset(len(paths), files.shape, read, undivided, len(names), names)


def _tfds(
    name: str, split: str, *, data_dir: str | None, image_size: int | None, crop: int | None, background: str | None
) -> Dataset:
    """An image data set of tensorflow-datasets, read with random access and without TensorFlow."""
    source, form, names = open_source(name, split, data_dir, __all__)
    if image_size is None and None in form.shape[:2]:
        raise UserError(f"the images of {name!r} may differ in size: set config.data.image_size to resize them")
    mode, channels = ("L", 1) if form.shape[-1] == 1 else ("RGB", 3)

    def fitted(image: np.ndarray) -> np.ndarray:
        if image.dtype == np.uint16:
            image = np.round(image / 257).astype(np.uint8)
        height, width, _ = image.shape
        if crop is None and image.shape == (image_size or height, image_size or width, channels):
            return image
        image = image.squeeze(2) if image.shape[2] == 1 else image
        return fit(Image.fromarray(image), image_size, mode, crop, background)

    def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        records = source.__getitems__([int(i) for i in indices])
        y = [record["label"] if names else 0 for record in records]
        return np.stack([fitted(record["image"]) for record in records]), np.array(y, np.int32)

    return Dataset(len(source), read(np.arange(1))[0].shape[1:], read, num_classes=len(names), class_names=names)


def to_float(x: Images, *, centered: bool, noise: Images | None = None) -> Images:
    """Raw images as float32: x/255 in [0, 1], or (x + noise)/256; `centered` maps to [-1, 1].

    Vectors (anything but uint8) pass unchanged.

    Args:
      x: uint8 `[b, h, w, c]`, or float32.
      centered: whether to map [0, 1] to [-1, 1].
      noise: in [0, 1), of the shape of x, so that the data have a density.
    """
    if x.dtype != np.uint8:
        return x.astype(np.float32)
    y = x.astype(np.float32) / np.float32(255) if noise is None else (x + noise) / np.float32(256)
    return 2 * y - 1 if centered else y


def augment(key: Array, x: Array, *, centered: bool, random_flip: bool, dequantize: bool) -> Array:
    """Training examples on the device, as `to_float` makes them of raw images.

    Args:
      key: a PRNG key.
      x: uint8 `[b, h, w, c]`, or float32 vectors.
      centered: as in `to_float`.
      random_flip: mirror each image left to right with probability 1/2.
      dequantize: add noise from U[0, 1).
    """
    key_flip, key_noise = jax.random.split(key)
    if random_flip and x.ndim == 4:
        x = jnp.where(jax.random.bernoulli(key_flip, shape=(len(x), 1, 1, 1)), x[:, :, ::-1], x)
    return to_float(x, centered=centered, noise=jax.random.uniform(key_noise, x.shape) if dequantize else None)


def to_uint8(x: np.ndarray, *, centered: bool) -> np.ndarray:
    """The inverse of `to_float`: float images to uint8, clipped and rounded."""
    y = (np.asarray(x) + 1) / 2 if centered else np.asarray(x)
    return np.clip(np.round(255 * y), 0, 255).astype(np.uint8)


class Batches:
    """Batch k of an endless, shuffled reading of a data set, as a function of k.

    Each epoch is a permutation of the data set; a batch may span two epochs, so none is short
    and no example is left out.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, rows: np.ndarray):
        self._dataset, self._batch_size, self._rows = dataset, batch_size, rows
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(dataset.size)
        )

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        epoch, place = np.divmod(k * self._batch_size + self._rows, self._dataset.size)
        x, y = self._dataset.read(np.array([self._order(int(e))[p] for e, p in zip(epoch, place, strict=True)]))
        return {"x": x, "y": y}


def chunks(n: int, size: int, *, multiple: int = 1) -> list[tuple[np.ndarray, int]]:
    """Indices that walk n examples, min(n, size) at a time, and how many of them count.

    All are filled up to one length, a multiple of `multiple`, so that nothing compiles anew.
    """
    size = min(n, size)
    parts = [np.arange(start, min(n, start + size)) for start in range(0, n, size)]
    return [(np.resize(part, -(-size // multiple) * multiple), len(part)) for part in parts]


def batches(dataset: Dataset, batch_size: int, *, seed: int, rows: np.ndarray | None = None) -> grain.DatasetIterator:
    """An endless iterator over training batches, read ahead by threads.

    Args:
      dataset: the data.
      batch_size: examples in a batch.
      seed: of the shuffles.
      rows: those of each batch to read, in order, all unless told: what one process of several needs.

    Returns:
      An iterator of `{'x': [rows, ...], 'y': int32 [rows]}`, raw, with `get_state()` and `set_state(state)`.
    """
    source = grain.MapDataset.source(
        Batches(dataset, batch_size, seed, np.arange(batch_size) if rows is None else rows)
    )
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def _main() -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m score_jax.data", description=prepare.__doc__)
    parser.add_argument("name", help="the data set, cifar10 say")
    parser.add_argument("--data_dir", help="where to write; the default is that of tensorflow-datasets")
    parser.add_argument("--archive", help="CIFAR-10's binary .tar.gz, if it is on disk already")
    arguments = parser.parse_args()
    if arguments.name in __all__:
        sys.exit(f"error: the data set {arguments.name!r} needs no preparation")
    try:
        prepare(arguments.name, data_dir=arguments.data_dir, archive=arguments.archive)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _main()
