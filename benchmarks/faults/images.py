"""Image files with damage of every kind, from fixed seeds, each read alone and in a folder.

Read right is what Pillow makes of the file, composed here in NumPy: turned as EXIF says, 16 bits scaled, on white.
"""

import io
import multiprocessing
import os
import pathlib
import resource
import struct
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.faults import Trial

COUNT, FOLDERS, SECONDS = 2990, 10, 10
SIZES = (0, 1, 255, 30_000, 65_535, 2**31 - 1, 2**32 - 1)


def originals(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Images of every mode in every format, some of them upside down or on their side."""
    rgba = rng.integers(0, 256, (9, 13, 4), np.uint8)
    rgba[:, :, :3] = np.linspace(0, 255, 9 * 13 * 3).reshape(9, 13, 3)
    grey = Image.fromarray(rgba[..., 0])
    deep = rng.integers(0, 2**16, (9, 13)).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = int(rng.integers(2, 9)), "a description"
    rgb, whole = Image.fromarray(rgba[..., :3]), Image.fromarray(rgba)
    plain: dict[str, Any] = {"1": grey.convert("1"), "L": grey, "RGB": rgb, "P": rgb.quantize(16)}
    deeper = {"I;16": Image.fromarray(deep), "LA": whole.convert("LA"), "RGBA": whole, "PA": whole.quantize(16)}
    wide = {"CMYK": rgb.convert("CMYK"), "I": Image.fromarray(deep.astype(np.int32)), "F": grey.convert("F")}
    sets = {
        "png": plain | deeper,
        "jpg": {mode: image for mode, image in (plain | wide).items() if mode in ("L", "RGB", "CMYK")},
        "webp": {"RGB": rgb, "RGBA": whole},
        "bmp": plain,
        "gif": plain,
        "tif": plain | deeper | wide,
        "ppm": {"L": grey, "RGB": rgb, "I": wide["I"]},
    }
    formats = {"jpg": "JPEG", "tif": "TIFF"}
    options: dict[str, list[dict[str, Any]]] = {
        "png": [{}, {"exif": exif}, {"optimize": True}],
        "jpg": [{}, {"exif": exif}, {"progressive": True, "exif": exif}],
        "webp": [{"lossless": True}, {"exif": exif}, {"save_all": True, "append_images": [whole.rotate(90)]}],
        "tif": [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}, {"exif": exif}],
        "gif": [{}, {"transparency": 3}, {"save_all": True, "append_images": [grey.rotate(180)]}],
    }
    for suffix, images in sets.items():
        for mode, image in images.items():
            for chosen in options.get(suffix, [{}]):
                if suffix == "tif" and mode == "PA":
                    continue  # Pillow does not write it.
                file = io.BytesIO()
                image.save(file, formats.get(suffix, suffix.upper()), **chosen)
                yield suffix, file.getvalue()


def flipped(rng: np.random.Generator, data: bytearray, upto: int | None = None) -> bytearray:
    for _ in range(rng.integers(1, 12)):
        data[rng.integers(min(upto or len(data), len(data)))] = rng.integers(256)
    return data


def with_runs(rng: np.random.Generator, data: bytearray) -> bytearray:
    start = int(rng.integers(len(data)))
    end = start + int(rng.integers(1, 40))
    data[start:end] = bytes([int(rng.choice([0, 255]))]) * (end - start)
    return data


def moved(rng: np.random.Generator, data: bytearray) -> bytearray:
    """A piece of the file once more, elsewhere, or missing."""
    start, end, to = (int(i) for i in rng.integers(0, len(data), 3))
    piece = data[min(start, end) : max(start, end)]
    if rng.random() < 0.5:
        return data[:to] + piece + data[to:]
    return data[: min(start, end)] + data[max(start, end) :]


def numbers(rng: np.random.Generator, data: bytearray) -> bytearray:
    """A number of two or four bytes, near the start, that is absurd: sizes, offsets, counts."""
    order, kind = rng.choice(["<", ">"]), rng.choice(["H", "I"])
    value = int(rng.choice(SIZES)) % 2 ** (16 if kind == "H" else 32)
    place = int(rng.integers(min(len(data), 80)))
    packed = struct.pack(f"{order}{kind}", value)
    data[place : place + len(packed)] = packed
    return data


CHUNKS = (
    "iCCP",
    "zTXt",
    "iTXt",
    "tEXt",
    "eXIf",
    "tRNS",
    "PLTE",
    "acTL",
    "fcTL",
    "fdAT",
    "gAMA",
    "cHRM",
    "pHYs",
    "sBIT",
)


def crafted(rng: np.random.Generator, data: bytearray) -> bytearray:
    """A chunk, marker or header that is well formed and says something else."""
    body = rng.integers(0, 256, int(rng.integers(0, 60)), np.uint8).tobytes()
    if data[1:4] == b"PNG":
        if rng.random() < 0.4:  # Another header, its checksum right.
            sizes = [int(rng.choice([1, 2, 9, 13, 30_000, 2**31 - 1])) for _ in range(2)]
            header = struct.pack(">IIBBBBB", *sizes, *(int(rng.choice([0, 1, 2, 3, 4, 6, 8, 16])) for _ in range(5)))
            return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]
        kind = str(rng.choice(CHUNKS)).encode()
        if kind in (b"iCCP", b"zTXt") and rng.random() < 0.5:  # A small file of many megabytes.
            body = b"name\0\0" + zlib.compress(b"\0" * 2**26)
        chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        return data[:33] + chunk + data[33:]
    if data[:2] == b"\xff\xd8":
        kind = bytes([0xFF, int(rng.integers(0xC0, 0xFF))])
        body = (
            rng.choice([b"Exif\0\0MM\0*\0\0\0\x08", b"ICC_PROFILE\0\1\1", b"MPF\0II*\0\x08\0\0\0", b""]).item() + body
        )
        return data[:2] + kind + struct.pack(">H", len(body) + 2) + body + data[2:]
    if data[:2] in (b"II", b"MM"):
        order = "<" if data[:2] == b"II" else ">"
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        place = start + 2 + 12 * int(rng.integers(count))
        kind, number, value = rng.integers(1, 13), int(rng.choice([0, 1, 2, 2**31])), int(rng.choice(SIZES))
        struct.pack_into(f"{order}HII", data, place + 2, kind, number, value)
        return data
    return numbers(rng, numbers(rng, data))


DAMAGE: dict[str, Callable[[np.random.Generator, bytearray], bytearray]] = {
    "whole": lambda rng, data: data,
    "cut short": lambda rng, data: data[: rng.integers(len(data))],
    "bytes": flipped,
    "header bytes": lambda rng, data: flipped(rng, data, 64),
    "a run of one byte": with_runs,
    "a piece moved": moved,
    "absurd numbers": numbers,
    "crafted": crafted,
    "crafted, bytes": lambda rng, data: flipped(rng, crafted(rng, data)),
    "appended": lambda rng, data: data + rng.integers(0, 256, 50, np.uint8).tobytes(),
}


def reference(path: pathlib.Path) -> np.ndarray | None:
    """What Pillow reads, composed in NumPy; None where it reads nothing."""
    try:
        with Image.open(path) as image:
            image.load()
            orientation = image.getexif().get(0x0112, 1)
            if image.mode.startswith(("I", "F")):
                tags = getattr(image, "tag_v2", {})
                most, x = 2.0 ** tags.get(258, (16,))[0] - 1, np.asarray(image) / 1.0
                opaque = x != image.info.get("transparency", -1)
                x = 255 * np.where(opaque, (most - x if tags.get(262) == 0 else x) / most, 1)
                x = np.repeat(x[..., None], 3, axis=-1)
            elif image.has_transparency_data:
                x = np.asarray(image.convert("RGBA")) / 255.0
                x = 255 * (x[..., :3] * x[..., 3:] + (1 - x[..., 3:]))
            else:
                x = np.asarray(image.convert("RGB"))
    except Exception:  # Whatever it is, Pillow does not read the file.
        return None
    if image.format != "TIFF" and orientation in range(2, 9):  # Pillow turns a TIFF itself.
        x = x.swapaxes(0, 1) if orientation >= 5 else x
        x = x[::-1] if orientation in (3, 4, 7, 8) else x
        x = x[:, ::-1] if orientation in (2, 3, 6, 7) else x
    return x


def judged(path: pathlib.Path) -> tuple[str, str]:
    """The verdict on one file, read alone and beside a good one in its folder."""
    from score_jax import data, images
    from score_jax.errors import UserError

    start, x, line, said = time.process_time(), None, "", ""
    try:
        x = images.open_image(path, None)
    except UserError as error:
        line = str(error)
    for size in (8, None):
        try:
            found, _ = data.load("folder", "train", data_dir=str(path.parent), image_size=size).read(np.arange(2))
        except UserError as error:
            if x is None or size or "differ in size" not in str(error):
                said = f"the folder cannot be read: {error}"
        else:
            if size and (found.shape != (2, 8, 8, 3) or (x is None and (found[0] != found[1]).any())):
                said = f"the folder is read wrong, {found.shape}"
    if (seconds := time.process_time() - start) > SECONDS:
        return "hang", f"{seconds:.0f} s"
    if said or "\n" in line or not line.startswith(("", f"cannot read the image {path}: ")[x is None]):
        return "silent", said or line
    expected = reference(path)
    if x is None:
        ours = ("32 bits", "cannot identify image file")  # Of no range, and of a format that is not read.
        pillow_reads = expected is not None and not any(words in line for words in ours)
        return ("silent", f"Pillow reads it: {line}") if pillow_reads else ("told", line)
    if expected is None or expected.shape != x.shape:
        return "silent", f"{x.shape} is not what Pillow reads"
    # Equal bytes come first, as the largest images would take gigabytes as floats.
    if not np.array_equal(expected, x) and np.abs(expected / 1.0 - x).max() > 1:
        return "silent", f"{x.shape} is not what Pillow reads"
    return "right", ""


def judged_together(folder: pathlib.Path) -> tuple[str, str]:
    """The verdict on a folder of many damaged images."""
    from score_jax import data
    from score_jax.errors import UserError

    try:
        dataset = data.load("folder", "train", data_dir=str(folder), image_size=8)
        dataset.read(np.arange(dataset.size))
    except UserError as error:
        return ("told" if "too many" in str(error) else "silent"), str(error)
    return "right", ""


def work(pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    for stream in (1, 2):  # What is told of files that are skipped, and what libtiff adds.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    from score_jax import data  # noqa: F401  Its import is no part of the time.

    while message := pipe.recv():
        fn, path = message
        # A hang within C ends the process; the reference takes its time, too.
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 6 * SECONDS, resource.RLIM_INFINITY))
        try:
            answer = fn(path)
        except Exception as error:  # A traceback, were it a run.
            answer = "traceback", f"{type(error).__name__}: {error}"
        pipe.send(answer)


class Reader:
    """A process that reads; a file that hangs or ends it costs that process alone."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def judge(self, fn: Callable, path: pathlib.Path) -> tuple[str, str]:
        self.pipe.send((fn, path))
        try:
            if self.pipe.poll(120):
                return self.pipe.recv()
            verdict = "hang", "120 s of waiting"
        except EOFError:  # SIGXCPU, 24, ends a process that has used up its time.
            self.process.join()
            hangs = self.process.exitcode == -24
            verdict = ("hang", f"{6 * SECONDS} s") if hangs else ("traceback", f"exit code {self.process.exitcode}")
        self.process.kill()
        self.start()
        return verdict


def trials() -> Iterator[Trial]:
    rng = np.random.default_rng(0)
    files = [original for _ in range(4) for original in originals(rng)]
    reader = Reader()
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        good = Image.new("RGB", (13, 9), (10, 20, 30))
        for i in range(COUNT):
            suffix, content = files[i % len(files)]
            names = list(DAMAGE)
            name = names[0] if i < len(files) // 4 else names[int(rng.integers(1, len(names)))]
            folder = root / f"{i}"
            folder.mkdir()
            (folder / f"a.{suffix}").write_bytes(DAMAGE[name](rng, bytearray(content)))
            good.save(folder / "b.png")
            yield Trial(f"{i}.{suffix}, {name}", *reader.judge(judged, folder / f"a.{suffix}"))
        for j in range(FOLDERS):
            together = root / f"together{j}"
            together.mkdir()
            for i in range(j, COUNT, FOLDERS):
                for path in (root / f"{i}").iterdir():
                    # Of the even ones nearly all are good.
                    if path.name[0] == "b" or j % 2 or i % 300 < 10:
                        path.rename(together / f"{i}{path.name}")
            yield Trial(f"a folder of {len(list(together.iterdir()))}", *reader.judge(judged_together, together))
    reader.pipe.send(None)
    reader.process.join()
