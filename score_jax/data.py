"""Data sets, and the pipeline that feeds them to training.

A data set is random access to raw examples.  The pipeline shuffles the indices anew in each
epoch, from a seed, reads a batch at a time, and turns it into float32 arrays.  Batch k is a
function of (seed, k) alone and grain counts k, so the pipeline's state is one number, and
training resumes at the very batch where it stopped.  TensorFlow is never imported.

A data set is a function `f(split, *, data_dir, image_size)` of this module; any other name is
an image data set of tensorflow-datasets, prepared beforehand by `prepare`:

    python -m score_jax.data cifar10 --data_dir=DIR
"""

import functools
import pathlib
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from PIL import Image, UnidentifiedImageError

from score_jax.errors import UserError, nearest

__all__ = ["checkerboard", "digits", "folder", "two_moons"]

SPLITS = ("train", "test")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Dataset(NamedTuple):
    """Random access to examples.

    Attributes:
      size: the number of examples.
      shape: the shape of one example, `(h, w, c)` or `(d,)`.
      read: `read(indices [b]) -> (x, y)`: uint8 images `[b, h, w, c]` or float32 vectors
        `[b, d]`, and int32 labels `[b]` (zeros where there are none).
    """

    size: int
    shape: tuple[int, ...]
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def load(name: str, split: str, *, data_dir: str | None = None, image_size: int | None = None) -> Dataset:
    """Open a data set by its name.

    Args:
      name: a function of this module, or an image data set of tensorflow-datasets.
      split: `train` or `test`.
      data_dir: where files lie; None for the default of tensorflow-datasets.
      image_size: images are cropped to a square and resized to this; None leaves them alone.

    Raises:
      UserError: if there is no such data set, or it is not on disk.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}{nearest(split, SPLITS)}")
    build = globals()[name] if name in __all__ else functools.partial(_tfds, name)
    return build(split, data_dir=data_dir, image_size=image_size)


def _from_arrays(x: np.ndarray, y: np.ndarray) -> Dataset:
    return Dataset(len(x), x.shape[1:], lambda indices: (x[indices], y[indices].astype(np.int32)))


def digits(split: str, *, data_dir: str | None = None, image_size: int | None = None) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 in 17 grey levels: 1,437 to train on, 360 to test."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = np.round(x.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    if image_size not in (None, 8):
        images = np.stack([_fit(Image.fromarray(image[..., 0]), image_size, "L") for image in images])
    order = np.random.default_rng(0).permutation(len(images))
    order = order[:1437] if split == "train" else order[1437:]
    return _from_arrays(images[order], y[order])


def two_moons(split: str, *, data_dir: str | None = None, image_size: int | None = None) -> Dataset:
    """Two interleaved half circles with Gaussian noise 0.1, of about unit variance; the label is the moon."""
    rng = np.random.default_rng(SPLITS.index(split))
    y = rng.integers(0, 2, 50_000)
    angle = rng.uniform(0, np.pi, y.shape)
    x = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=1) * np.where(y, -1, 1)[:, None]
    return _from_arrays((x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32), y)


def checkerboard(split: str, *, data_dir: str | None = None, image_size: int | None = None) -> Dataset:
    """Uniform on the eight dark fields of a 4x4 board over [-2, 2]^2; the label is the field's column."""
    rng = np.random.default_rng(SPLITS.index(split))
    column = rng.integers(0, 4, 50_000)
    row = 2 * rng.integers(0, 2, column.shape) + column % 2
    x = np.stack([column, row], axis=1) + rng.uniform(size=(len(column), 2)) - 2
    return _from_arrays(x.astype(np.float32), column)


def folder(split: str, *, data_dir: str | None = None, image_size: int | None = None) -> Dataset:
    """A folder of RGB images, in `data_dir/<split>` if that exists, else in `data_dir` itself.

    Images in subfolders are labelled by the first of them, in alphabetical order.

    Raises:
      UserError: if the folder is missing or empty, or images differ in size and `image_size` is None.
    """
    if data_dir is None:
        raise UserError("the data set 'folder' needs config.data.dir, a directory of images")
    root = pathlib.Path(data_dir)
    root = root / split if (root / split).is_dir() else root
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(
            f"no images ({', '.join(sorted(SUFFIXES))}) in {root}: set config.data.dir to a folder of images"
        )
    groups = [p.relative_to(root).parts[0] if p.parent != root else "" for p in paths]
    y = np.unique(groups, return_inverse=True)[1].astype(np.int32)

    def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = [_open(paths[i], image_size) for i in indices]
        if len({image.shape for image in images}) > 1:
            raise UserError(f"the images in {root} differ in size: set config.data.image_size to resize them")
        return np.stack(images), y[indices]

    return Dataset(len(paths), read(np.arange(1))[0].shape[1:], read)


def read_images(path: pathlib.Path, shape: tuple[int, int, int]) -> np.ndarray:
    """An image file, or all those of a folder, as uint8 `[n, *shape]`, cropped to a square and resized if need be.

    Raises:
      UserError: if there is no image, or one cannot be read, or has another shape and none of a square is wanted.
    """
    paths = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not paths:
        raise UserError(f"no images ({', '.join(sorted(SUFFIXES))}) in {path}")
    size = shape[0] if shape[0] == shape[1] else None
    images = [_open(p, size, "L" if shape[-1] == 1 else "RGB") for p in paths]
    for p, image in zip(paths, images, strict=True):
        if image.shape != shape:
            raise UserError(f"the image {p} has shape {image.shape}, and the network's images have {shape}")
    return np.stack(images)


def _open(path: pathlib.Path, image_size: int | None, mode: str = "RGB") -> np.ndarray:
    try:
        with Image.open(path) as image:
            return _fit(image, image_size, mode)
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"cannot read the image {path}: {error}") from error


def _fit(image: Image.Image, size: int | None, mode: str) -> np.ndarray:
    """A PIL image as uint8 `[h, w, c]`, cropped to its central square and resized, if a size is given."""
    image = image.convert(mode)
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image.height, image.width, -1)


def _tfds(name: str, split: str, *, data_dir: str | None, image_size: int | None) -> Dataset:
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
        if image_size is not None and images[0].shape[:2] != (image_size, image_size):
            mode = "L" if images[0].shape[-1] == 1 else "RGB"
            images = [_fit(Image.fromarray(image.squeeze()), image_size, mode) for image in images]
        return np.stack(images), np.array([record.get("label", 0) for record in records], np.int32)

    return Dataset(len(source), read(np.arange(1))[0].shape[1:], read)


def prepare(name: str, *, data_dir: str | None = None, archive: str | None = None) -> None:
    """Download a data set of tensorflow-datasets and write it as array_record files, without TensorFlow.

    Args:
      name: the data set's name.
      data_dir: where to write; None for the default of tensorflow-datasets.
      archive: for CIFAR-10, the binary version's `.tar.gz` if it is on disk already.
    """
    import tensorflow_datasets as tfds

    make = functools.partial(_cifar, archive) if name == "cifar10" else functools.partial(tfds.builder, name)
    make(data_dir=data_dir, file_format="array_record").download_and_prepare(file_format="array_record")


def _cifar(archive: str | None, **kwargs: Any):
    """tensorflow-datasets' CIFAR-10 builder with TensorFlow's file reading replaced by `tarfile`."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.image_classification import cifar

    with tfds.core.registered.skip_registration():  # The stock builder keeps the name.

        class Cifar10(cifar.Cifar10):
            def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
                path = archive or dl_manager.download(self._cifar_info.url)
                return {s: self._records(str(path), s, getattr(self._cifar_info, f"{s}_files")) for s in SPLITS}

            def _records(self, path: str, split: str, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
                with tarfile.open(path) as tar:
                    members = {pathlib.PurePath(m.name).name: m for m in tar.getmembers()}
                    blob = b"".join(tar.extractfile(members[n]).read() for n in names)  # type: ignore[union-attr]
                for i, row in enumerate(np.frombuffer(blob, np.uint8).reshape(-1, 1 + 3072)):
                    # A PIL image: an array would be encoded by TensorFlow.
                    image = Image.fromarray(row[1:].reshape(3, 32, 32).transpose(1, 2, 0))
                    yield i, {"id": f"{split}_{i:05d}", "image": image, "label": int(row[0])}

    return Cifar10(**kwargs)


def to_float(
    x: np.ndarray, rng: np.random.Generator, *, centered: bool, random_flip: bool = False, dequantize: bool = False
) -> np.ndarray:
    """Raw images as float32: x/255 in [0, 1], or (x + u)/256 with `dequantize`; `centered` maps to [-1, 1].

    Vectors (anything but uint8) pass unchanged.

    Args:
      x: uint8 `[b, h, w, c]`, or float32.
      rng: draws the flips and the dequantization noise u ~ U[0, 1).
      centered: whether to map [0, 1] to [-1, 1].
      random_flip: mirror each image left to right with probability 1/2.
      dequantize: add uniform noise, so that the data have a density.
    """
    if x.dtype != np.uint8:
        return x.astype(np.float32)
    if random_flip:
        x = np.where(rng.random(len(x))[:, None, None, None] < 0.5, x[:, :, ::-1], x)
    noise = rng.random(x.shape, np.float32) if dequantize else 0
    y = (x.astype(np.float32) + noise) / np.float32(256 if dequantize else 255)
    return 2 * y - 1 if centered else y


def to_uint8(x: np.ndarray, *, centered: bool) -> np.ndarray:
    """The inverse of `to_float`: float images to uint8, clipped and rounded."""
    y = (np.asarray(x) + 1) / 2 if centered else np.asarray(x)
    return np.clip(np.round(255 * y), 0, 255).astype(np.uint8)


class Batches:
    """Batch k of an endless, shuffled reading of a data set, as a function of k.

    Each epoch is a permutation of the data set; a batch may span two epochs, so none is short
    and no example is left out.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, transform: Callable):
        self._dataset, self._batch_size, self._seed, self._transform = dataset, batch_size, seed, transform
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(dataset.size)
        )

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        epoch, place = np.divmod(np.arange(k * self._batch_size, (k + 1) * self._batch_size), self._dataset.size)
        x, y = self._dataset.read(np.array([self._order(int(e))[p] for e, p in zip(epoch, place, strict=True)]))
        # A stream of its own, apart from that of the permutations.
        return {"x": self._transform(x, np.random.default_rng((self._seed, k, 1))), "y": y}


def chunks(n: int, size: int) -> list[tuple[np.ndarray, int]]:
    """Indices that walk n examples, min(n, size) at a time, and how many of them count.

    The last are filled up, so that nothing compiles anew.
    """
    size = min(n, size)
    parts = [np.arange(start, min(n, start + size)) for start in range(0, n, size)]
    return [(np.resize(part, size), len(part)) for part in parts]


def batches(dataset: Dataset, batch_size: int, *, seed: int, transform: Callable) -> grain.DatasetIterator:
    """An endless iterator over training batches, read ahead by threads.

    Args:
      dataset: the data.
      batch_size: examples in a batch.
      seed: of the shuffles and of the transform's draws.
      transform: `transform(x, rng) -> float32`, see `to_float`.

    Returns:
      An iterator of `{'x': float32 [batch, ...], 'y': int32 [batch]}` with `get_state()` and `set_state(state)`.
    """
    source = grain.MapDataset.source(Batches(dataset, batch_size, seed, transform))
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def _main() -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m score_jax.data", description=prepare.__doc__)
    parser.add_argument("name", help="the data set, cifar10 say")
    parser.add_argument("--data_dir", help="where to write; the default is that of tensorflow-datasets")
    parser.add_argument("--archive", help="CIFAR-10's binary .tar.gz, if it is on disk already")
    arguments = parser.parse_args()
    prepare(arguments.name, data_dir=arguments.data_dir, archive=arguments.archive)


if __name__ == "__main__":
    _main()
