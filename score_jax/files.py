"""Image files of a folder, and their classes: found, read by their number, a few that cannot be read passed over."""

import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from score_jax.errors import UserError
from score_jax.images import open_image, stored_size

__all__ = ["Files", "open_split", "read_images"]

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# What systems put beside people's files, other than by a name that begins with a dot.
SIDE = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
FOLDERS = {"train": ("train",), "test": ("test", "val", "validation")}  # By the split.


def open_split(directory: str, split: str) -> tuple[list[pathlib.Path], np.ndarray, tuple[str, ...], bool]:
    """A split of a folder of images: its paths, their labels, the classes' names, and whether it is not divided.

    The first subfolder on the way to an image is its class; there are none where not all images lie in one.

    Raises:
      UserError: if there are no images, or there is the other split alone.
    """
    root = pathlib.Path(os.path.expanduser(directory))
    places = {s: [d for n in names if (d := root / n).is_dir()] for s, names in FOLDERS.items()}
    undivided = not places[split]
    if any(places.values()) and undivided:
        raise UserError(
            f"{directory} is divided, but has no folder for the split {split!r}: {' or '.join(FOLDERS[split])}"
        )
    if undivided and split == "test":
        print(f"{root} is not divided into train/ and test/: the test split is all images, those trained on")
    root = root if undivided else places[split][0]
    paths, names = _images_and_classes(root)
    if not paths:
        raise UserError(
            f"no images ({', '.join(sorted(SUFFIXES))}) in {root}: set config.data.dir to a folder of images"
        )
    if names and split == "test" and places["train"]:
        # What the network was told in training keeps its number, whatever the test split has.
        trained = _images_and_classes(places["train"][0])[1]
        names = [*trained, *(name for name in names if name not in trained)]
    number = {name: i for i, name in enumerate(names)}
    y = np.array([number[p.relative_to(root).parts[0]] if names else 0 for p in paths], np.int32)
    return paths, y, tuple(names), undivided


def _images_and_classes(root: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """The images of a folder, and the subfolders that are their classes; none where not all images lie in one."""
    paths = _find_images(root)
    names = sorted({p.relative_to(root).parts[0] for p in paths if p.parent != root})
    beside = [p for p in paths if p.parent == root]
    if names and beside:
        print(f"{root} holds images beside its folders, {beside[0].name} say: the folders are not taken for classes")
        names = []
    return paths, names


def _find_images(root: pathlib.Path, *, deep: bool = True) -> list[pathlib.Path]:
    """The image files in a folder, sorted, without hidden ones.

    Links are followed, but to no folder twice in one subfolder of `root`, so that a circle of them ends.  A link to
    nothing is named; where its name is an image's it stays in the list, for the reader to count it as unreadable.

    Args:
      root: the folder.
      deep: whether to look into its subfolders.

    Raises:
      UserError: if a folder cannot be listed.
    """
    found: list[pathlib.Path] = []
    folders = [(str(root), {_identity(str(root))})]
    while folders:
        folder, seen = folders.pop()
        for entry in _entries(folder):
            if entry.name.startswith(".") or entry.name in SIDE:
                continue
            dangling = entry.is_symlink() and not os.path.exists(entry.path)
            if not dangling and entry.is_dir():
                reached = set(seen) if folder == str(root) else seen
                if deep and (identity := _identity(entry.path)) not in reached:
                    reached.add(identity)
                    folders.append((entry.path, reached))
            elif (path := pathlib.Path(entry.path)).suffix.lower() in SUFFIXES:
                if dangling or entry.is_file():
                    found.append(path)
            elif dangling and deep:  # It may have been a class.
                _tell(f"{path} is a link to nothing; skipped")
    return sorted(found)


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError:
        return 0, 0  # `_entries` says why.
    return status.st_dev, status.st_ino


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}") from error


def _tell(line: str) -> None:
    # The name of a file can hold bytes that are no text; in one piece, as other threads tell of theirs.
    print(line.encode(errors="backslashreplace").decode() + "\n", end="", flush=True)


class Files:
    """Image files by their number, all of one shape.

    One that cannot be read is named, once, and the next one stands for it, so that a batch is the same whenever it is
    read; up to a hundredth of all files, or 10.

    Attributes:
      shape: of every image, `(h, w, 3)`.

    Raises:
      UserError: if the images differ in size, by their headers, and none is wanted; if too many cannot be read.
    """

    def __init__(
        self,
        paths: Sequence[pathlib.Path],
        image_size: int | None,
        crop: int | None = None,
        background: str | None = None,
    ):
        self._paths, self._image_size, self._crop, self._background = paths, image_size, crop, background
        self._bad = set[int]()
        self.shape: tuple[int, ...] = ()
        if image_size is None:
            self._check_sizes()
        self.shape = self.read(0)[0].shape

    def read(self, i: int) -> tuple[np.ndarray, int]:
        """An image, and which it is."""
        while True:
            if i not in self._bad:
                try:
                    return self._open(i), i
                except UserError as error:
                    self._skip(i, error)
            i = (i + 1) % len(self._paths)

    def _open(self, i: int) -> np.ndarray:
        path = self._paths[i]
        image = open_image(path, self._image_size, crop=self._crop, background=self._background)
        if self.shape and image.shape != self.shape:
            raise UserError(f"cannot use the image {path}: its shape is {image.shape}, that of the others {self.shape}")
        return image

    def _skip(self, i: int, error: UserError) -> None:
        self._bad.add(i)
        _tell(f"{error}; skipped")
        if len(self._bad) > max(10, len(self._paths) // 100) or len(self._bad) == len(self._paths):
            raise UserError(f"{error}, and so {len(self._bad)} of {len(self._paths)} images: too many") from error

    def _readable(self, i: int) -> bool:
        """Whether an image has the size that its header says; if it cannot be read it is skipped."""
        try:
            self._open(i)
        except UserError as error:
            self._skip(i, error)
            return False
        return True

    def _size(self, i: int) -> tuple[int, int] | UserError:
        try:
            return stored_size(self._paths[i], self._crop)
        except UserError as error:
            return error

    def _check_sizes(self) -> None:
        n, first = len(self._paths), None
        parts = [range(start, min(n, start + 64)) for start in range(0, n, 64)]

        def look(part: range) -> list[tuple[int, tuple[int, int] | UserError]]:
            return [(i, self._size(i)) for i in part]

        # Threads, as a file system on a network answers late.
        with ThreadPoolExecutor(8) as pool, tqdm(total=n, unit="file", desc="image sizes", disable=None) as bar:
            try:
                for part in pool.map(look, parts):
                    for i, size in part:
                        if isinstance(size, UserError):
                            self._skip(i, size)
                        elif first is None or (size != first[1] and not self._readable(first[0])):
                            first = (i, size)
                        elif size != first[1] and self._readable(i):
                            one, other = (f"{self._paths[j]} is {w} x {h}" for j, (w, h) in (first, (i, size)))
                            advice = "set config.data.image_size to resize them"
                            raise UserError(f"the images differ in size: {one}, {other}: {advice}")
                    bar.update(len(part))
            finally:
                pool.shutdown(cancel_futures=True)


def read_images(path: pathlib.Path, shape: tuple[int, int, int], *, background: str | None = None) -> np.ndarray:
    """An image file, or all those of a folder, as uint8 `[n, *shape]`, cropped to a square and resized if need be.

    Args:
      path: the file or the folder, without its subfolders.
      shape: `(h, w, c)`.
      background: the colour behind what is transparent, see `fit`.

    Raises:
      UserError: if there is no image, or one cannot be read, or has another shape and none of a square is wanted.
    """
    paths = _find_images(path, deep=False) if path.is_dir() else [path]
    if not paths:
        raise UserError(f"no images ({', '.join(sorted(SUFFIXES))}) in {path}")
    size = shape[0] if shape[0] == shape[1] else None
    images = [open_image(p, size, "L" if shape[-1] == 1 else "RGB", background=background) for p in paths]
    for p, image in zip(paths, images, strict=True):
        if image.shape != shape:
            raise UserError(f"the image {p} has shape {image.shape}, and the network's images have {shape}")
    return np.stack(images)
