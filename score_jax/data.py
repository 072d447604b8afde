"""Data sets, and the pipeline that feeds them to training.

A data set is random access to raw examples.  The pipeline shuffles the indices anew in each
epoch, from a seed, and reads a batch at a time, or the rows of it that one process of several
needs.  Batch k is a function of (seed, k) alone and grain counts k, so the pipeline's state is
one number, and training resumes at the very batch where it stopped, on any number of processes.
Images stay uint8 up to the device, where `augment` makes floats of them.  TensorFlow is never
imported.

A data set is a function `f(split, *, data_dir, image_size, crop)` of this module; any other name is
an image data set of tensorflow-datasets, prepared beforehand by `prepare`:

    python -m score_jax.data cifar10 --data_dir=DIR
"""

import functools
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from score_jax.errors import UserError, nearest
from score_jax.images import SUFFIXES, Files, fit
from score_jax.prepare import prepare

__all__ = ["checkerboard", "digits", "folder", "two_moons"]

SPLITS = ("train", "test")
FOLDERS = {"train": ("train",), "test": ("test", "val", "validation")}  # Of a folder of images, by the split.
Images = TypeVar("Images", np.ndarray, Array)


class Dataset(NamedTuple):
    """Random access to examples.

    Attributes:
      size: the number of examples.
      shape: the shape of one example, `(h, w, c)` or `(d,)`.
      read: `read(indices [b]) -> (x, y)`: uint8 images `[b, h, w, c]` or float32 vectors
        `[b, d]`, and int32 labels `[b]` (zeros where there are none).
      undivided: whether the other split is of the same examples.
    """

    size: int
    shape: tuple[int, ...]
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    undivided: bool = False


def load(
    name: str, split: str, *, data_dir: str | None = None, image_size: int | None = None, crop: int | None = None
) -> Dataset:
    """Open a data set by its name.

    Args:
      name: a function of this module, or an image data set of tensorflow-datasets.
      split: `train` or `test`.
      data_dir: where files lie; None for the default of tensorflow-datasets.
      image_size: images are cropped to a square and resized to this; None leaves them alone.
      crop: the side of that square, in the middle; None for the largest.

    Raises:
      UserError: if there is no such data set, or it is not on disk.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}{nearest(split, SPLITS)}")
    build = globals()[name] if name in __all__ else functools.partial(_tfds, name)
    return build(split, data_dir=data_dir, image_size=image_size, crop=crop)


def _from_arrays(x: np.ndarray, y: np.ndarray) -> Dataset:
    return Dataset(len(x), x.shape[1:], lambda indices: (x[indices], y[indices].astype(np.int32)))


def digits(
    split: str, *, data_dir: str | None = None, image_size: int | None = None, crop: int | None = None
) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 in 17 grey levels: 1,437 to train on, 360 to test."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = np.round(x.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    if image_size not in (None, 8) or crop:
        images = np.stack([fit(Image.fromarray(image[..., 0]), image_size, "L", crop) for image in images])
    order = np.random.default_rng(0).permutation(len(images))
    order = order[:1437] if split == "train" else order[1437:]
    return _from_arrays(images[order], y[order])


def two_moons(
    split: str, *, data_dir: str | None = None, image_size: int | None = None, crop: int | None = None
) -> Dataset:
    """Two interleaved half circles with Gaussian noise 0.1, of about unit variance; the label is the moon."""
    rng = np.random.default_rng(SPLITS.index(split))
    y = rng.integers(0, 2, 50_000)
    angle = rng.uniform(0, np.pi, y.shape)
    x = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=1) * np.where(y, -1, 1)[:, None]
    return _from_arrays((x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32), y)


def checkerboard(
    split: str, *, data_dir: str | None = None, image_size: int | None = None, crop: int | None = None
) -> Dataset:
    """Uniform on the eight dark fields of a 4x4 board over [-2, 2]^2; the label is the field's column."""
    rng = np.random.default_rng(SPLITS.index(split))
    column = rng.integers(0, 4, 50_000)
    row = 2 * rng.integers(0, 2, column.shape) + column % 2
    x = np.stack([column, row], axis=1) + rng.uniform(size=(len(column), 2)) - 2
    return _from_arrays(x.astype(np.float32), column)


def folder(
    split: str, *, data_dir: str | None = None, image_size: int | None = None, crop: int | None = None
) -> Dataset:
    """A folder of RGB images: in `data_dir/train` and `/test` (or `/val`, `/validation`), or in `data_dir` itself.

    Where it is not divided both splits are all images, and that is printed.  Images in subfolders are labelled by the
    first of them, in alphabetical order.  A few that cannot be read are named and skipped.

    Raises:
      UserError: if the folder is missing or empty, or has the other split alone, or images differ in size and
        `image_size` is None.
    """
    if data_dir is None:
        raise UserError("the data set 'folder' needs config.data.dir, a directory of images")
    places = {s: [d for n in FOLDERS[s] if (d := pathlib.Path(data_dir, n)).is_dir()] for s in SPLITS}
    if any(places.values()) and not places[split]:
        raise UserError(
            f"{data_dir} is divided, but has no folder for the split {split!r}: {' or '.join(FOLDERS[split])}"
        )
    root, undivided = pathlib.Path(data_dir), not places[split]
    if not undivided:
        root = places[split][0]
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(
            f"no images ({', '.join(sorted(SUFFIXES))}) in {root}: set config.data.dir to a folder of images"
        )
    groups = [p.relative_to(root).parts[0] if p.parent != root else "" for p in paths]
    y = np.unique(groups, return_inverse=True)[1].astype(np.int32)
    if undivided and split == "test":
        print(f"{root} is not divided into train/ and test/: the test split is all images, those trained on")
    files = Files(paths, image_size, crop)

    def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, found = zip(*(files.read(int(i)) for i in indices), strict=True)
        if len({image.shape for image in images}) > 1:
            raise UserError(f"the images in {root} differ in size: set config.data.image_size to resize them")
        return np.stack(images), y[list(found)]

    return Dataset(len(paths), read(np.arange(1))[0].shape[1:], read, undivided)


def _tfds(name: str, split: str, *, data_dir: str | None, image_size: int | None, crop: int | None) -> Dataset:
    """An image data set of tensorflow-datasets, read with random access and without TensorFlow."""
    import tensorflow_datasets as tfds

    names = tfds.list_builders(with_community_datasets=False)
    if name.split(":")[0].split("/")[0] not in names:
        raise UserError(f"unknown data set {name!r}{nearest(name, [*__all__, *names])}")
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        if not builder.data_path.exists():
            raise FileNotFoundError(builder.data_path)
        available = list(builder.info.splits)
        # Some data sets have no test split (FFHQ, LSUN's is 'validation').
        split = split if split in available else {"test": "validation"}.get(split, split)
        if split not in available:
            raise UserError(f"data set {name!r} has no split {split!r}; it has {', '.join(available)}")
        source = builder.as_data_source(split=split)
    except (FileNotFoundError, tfds.core.registered.DatasetNotFoundError, NotImplementedError) as error:
        where = f" --data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"data set {name!r} is not on disk ({error}): prepare it with `python -m score_jax.data {name}{where}`"
        ) from error

    def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        records = source.__getitems__([int(i) for i in indices])
        images = [record["image"] for record in records]
        mode = "L" if images[0].shape[-1] == 1 else "RGB"
        if image_size is not None or crop is not None:
            images = [
                image
                if crop is None and image.shape[:2] == (image_size, image_size)
                else fit(Image.fromarray(image.squeeze()), image_size, mode, crop)
                for image in images
            ]
        return np.stack(images), np.array([record.get("label", 0) for record in records], np.int32)

    return Dataset(len(source), read(np.arange(1))[0].shape[1:], read)


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
    try:
        prepare(arguments.name, data_dir=arguments.data_dir, archive=arguments.archive)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _main()
