"""Data sets of tensorflow-datasets: downloaded and written as array_record files, and those files opened."""

import functools
import pathlib
import sys
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from score_jax import disk
from score_jax.errors import UserError, nearest

__all__ = ["open_source", "prepare"]


def open_source(name: str, split: str, data_dir: str | None, ours: Sequence[str]) -> tuple[Any, Any, tuple[str, ...]]:
    """The records of a split, with random access and without TensorFlow; the feature of their images; their classes.

    Args:
      name: of an image data set of tensorflow-datasets.
      split: `train` or `test`.
      data_dir: where its files lie; None for the default of tensorflow-datasets.
      ours: names of data sets from elsewhere, one of which may have been meant.

    Raises:
      UserError: if there is no such data set, it is not on disk, or it lacks the split or images.
    """
    import tensorflow_datasets as tfds

    names = tfds.list_builders(with_community_datasets=False)
    if name.split(":")[0].split("/")[0] not in names:
        listed = [*ours, f"{len(names)} of tensorflow-datasets"]
        raise UserError(f"unknown data set {name!r}{nearest(name, [*ours, *names], listed=listed)}")
    try:
        builder = _builder(name, data_dir=data_dir, file_format="array_record")
        if not builder.data_path.exists():
            raise FileNotFoundError(builder.data_path)
        available = list(builder.info.splits)
        # Some data sets have no test split (FFHQ, LSUN's is 'validation').
        split = split if split in available else {"test": "validation"}.get(split, split)
        if split not in available:
            raise UserError(f"data set {name!r} has no split {split!r}; it has {', '.join(available)}")
        features = dict(builder.info.features.items())
        image, label = features.get("image"), features.get("label")
        if not isinstance(image, tfds.features.Image) or np.dtype(image.np_dtype) not in (np.uint8, np.uint16):
            raise UserError(f"data set {name!r} has no 'image' of 8 or 16 bits; it has {', '.join(features)}")
        classes = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) and label.num_classes else ()
        return builder.as_data_source(split=split), image, classes
    except (FileNotFoundError, tfds.core.registered.DatasetNotFoundError, NotImplementedError) as error:
        where = f" --data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"data set {name!r} is not on disk ({error}): prepare it with `python -m score_jax.data {name}{where}`"
        ) from error


def prepare(name: str, *, data_dir: str | None = None, archive: str | None = None) -> None:
    """Download a data set of tensorflow-datasets and write it as array_record files, without TensorFlow.

    Args:
      name: the data set's name.
      data_dir: where to write; None for the default of tensorflow-datasets.
      archive: for CIFAR-10, the binary version's `.tar.gz` if it is on disk already.

    Raises:
      UserError: if there is no such data set, or tensorflow-datasets prepares it by TensorFlow.
    """
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    make = functools.partial(_cifar, archive) if name == "cifar10" else functools.partial(_builder, name)
    try:
        make(data_dir=data_dir, file_format="array_record").download_and_prepare(file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        names = tfds.list_builders(with_community_datasets=False)
        raise UserError(f"unknown data set {name!r}{nearest(name, names)}") from error
    except OSError as error:
        raise disk.told(error, pathlib.Path(data_dir or "the default directory of tensorflow-datasets")) from error
    except RuntimeError as error:  # So array_record says what the system told it.
        raise UserError(f"cannot prepare {name!r}: {' '.join(str(error).split())}") from error
    except ImportError as error:
        raise UserError(
            f"tensorflow-datasets needs a package to prepare {name!r}, TensorFlow as a rule "
            f"({str(error).splitlines()[0]}): prepare it where that is installed, by tfds.builder({name!r}, "
            "data_dir=DIR, file_format='array_record').download_and_prepare(), and set config.data.dir to a copy of DIR"
        ) from error


def _builder(name: str, **kwargs: Any) -> Any:
    """tensorflow-datasets' builder by a name that may state a config and a version, `name/config:1.0.0`."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, **kwargs)
    except tfds.core.registered.DatasetNotFoundError:
        raise
    except (ValueError, AssertionError) as error:
        raise UserError(f"unknown data set {name!r}: {' '.join(str(error).split())[:300]}") from error


def _cifar(archive: str | None, **kwargs: Any):
    """tensorflow-datasets' CIFAR-10 builder with TensorFlow's file reading replaced by `tarfile`."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.image_classification import cifar

    with tfds.core.registered.skip_registration():  # The stock builder keeps the name.

        class Cifar10(cifar.Cifar10):
            def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
                path = archive or dl_manager.download(self._cifar_info.url)
                return {
                    s: self._records(str(path), s, getattr(self._cifar_info, f"{s}_files")) for s in ("train", "test")
                }

            def _records(self, path: str, split: str, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
                with tarfile.open(path) as tar:
                    members = {pathlib.PurePath(m.name).name: m for m in tar.getmembers()}
                    blob = b"".join(tar.extractfile(members[n]).read() for n in names)  # type: ignore[union-attr]
                for i, row in enumerate(np.frombuffer(blob, np.uint8).reshape(-1, 1 + 3072)):
                    # A PIL image: an array would be encoded by TensorFlow.
                    image = Image.fromarray(row[1:].reshape(3, 32, 32).transpose(1, 2, 0))
                    yield i, {"id": f"{split}_{i:05d}", "image": image, "label": int(row[0])}

    return Cifar10(**kwargs)
