"""Damaged files in a workdir, and a full disk at every kind of write.

Each trial is a process on a copy of one trained workdir; what it makes must be what it makes of the undamaged one.  A
full disk is a small tmpfs, which takes root to mount.
"""

import concurrent.futures
import contextlib
import json
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks import faults

SETTINGS = {
    "network.features": 16,
    "training.num_steps": 20,
    "training.batch_size": 16,
    "training.log_every": 10,
    "training.checkpoint_every": 10,
    "sampling.num_samples": 16,
    "sampling.batch_size": 4,
    "sampling.num_steps": 3,
    "sampling.grid": "log_snr",
    "evaluation.num_samples": 16,
}
FLAGS = ["--config=configs/toy2d.py", *(f"--config.{name}={value}" for name, value in SETTINGS.items())]
LONGER = "--config.training.num_steps=30"
POSITION = "checkpoints/20/data/metadata"
SECONDS = 30.0
PROGRESS = re.compile(r"step |resuming |[a-z_ ]+ +[-+.e\d]+ +[-+.e\d]+$| +generated +real$")

# What is put in place of a small file: nothing, half of it, no text, JSON of another kind.
CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda old: b"",
    "half": lambda old: old[: len(old) // 2],
    "NULs": lambda old: bytes(len(old)),
    "a list": lambda old: b"[1, 2]\n",
    "null": lambda old: b"null\n",
    "nested deep": lambda old: b"[" * 100_000,
}


def command(workdir: pathlib.Path, *flags: str, cache: pathlib.Path) -> faults.Ended:
    # A process alone on the machine takes seconds; others may share it.
    return faults.run(
        ["run.py", *FLAGS, f"--workdir={workdir}", *flags],
        seconds=600,
        JAX_COMPILATION_CACHE_DIR=str(cache),
        XLA_FLAGS="--xla_backend_optimization_level=1",
    )


def write(file: pathlib.Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes() if file.exists() else b'{"step": 20, "a": 1}'))


def directory(file: pathlib.Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def partial(workdir: pathlib.Path, cache: pathlib.Path) -> None:
    """Leave half of the samples, as a process does that is killed."""
    code = (
        "import os, sys; from score_jax import sample_files as s; add = s.SampleFile.append\n"
        "def append(self, x): add(self, x); self._done < 8 or os._exit(9)\n"
        "s.SampleFile.append = append; sys.argv = sys.argv[1:]\n"
        "import runpy; sys.path.insert(0, ''); runpy.run_path('run.py', run_name='__main__')"
    )
    faults.run(
        ["-c", code, "run.py", *FLAGS, f"--workdir={workdir}", "--mode=sample"], JAX_COMPILATION_CACHE_DIR=str(cache)
    )
    assert (workdir / "samples/partial.npy").exists()


def damages() -> Iterator[tuple[str, list[str], Callable[[pathlib.Path], object]]]:
    """The name of each, the flags to start with, and what to do to a workdir before."""
    sample, evaluate, train = ["--mode=sample"], ["--mode=evaluate"], [LONGER]
    for what, change in CONTENTS.items():
        yield f"config.yaml: {what}", sample, lambda w, c=change: write(w / "config.yaml", c)
        yield f"metrics.jsonl: {what}", train, lambda w, c=change: write(w / "metrics.jsonl", c)
        yield f"evaluation.json: {what}", sample, lambda w, c=change: write(w / "evaluation.json", c)
        yield f"partial.json: {what}", sample, lambda w, c=change: write(w / "samples/partial.json", c)
        yield f"partial.npy: {what}", sample, lambda w, c=change: write(w / "samples/partial.npy", c)
        yield f"position in the data: {what}", train, lambda w, c=change: write(w / POSITION, c)
        yield f"the newest picture: {what}", evaluate, lambda w, c=change: write(w / "samples/step_20.png", c)
    for index in (-1, 2**70, "a", None, 3.5):
        text = json.dumps({"next_index": index}).encode()
        yield f"next_index {index!r}", train, lambda w, t=text: (w / POSITION).write_bytes(t)
    for name in ("config.yaml", "metrics.jsonl", "evaluation.json", ".lock", ".lock_sampling", "report.html"):
        flags = train if name == ".lock" else sample
        yield f"{name} is a directory", flags, lambda w, n=name: directory(w / n)
    middle = b'{"step": 5, "loss": 1.0}\n{"step": 6, "lo\n\x00\x00\n'
    yield "metrics.jsonl: lines in the middle", sample, lambda w: write(w / "metrics.jsonl", lambda old: middle + old)
    yield "metrics.jsonl: half a line at the end", sample, lambda w: write(w / "metrics.jsonl", lambda o: o + b'{"st')
    yield "partial.npy is missing", sample, lambda w: (w / "samples/partial.npy").unlink()
    yield "partial.npy: a flipped bit", sample, lambda w: write(w / "samples/partial.npy", lambda o: flip(o, 150))
    yield "samples is a file", sample, lambda w: (shutil.rmtree(w / "samples"), (w / "samples").touch())
    yield "samples is missing", sample, lambda w: shutil.rmtree(w / "samples")
    yield "checkpoints is a file", sample, lambda w: (shutil.rmtree(w / "checkpoints"), (w / "checkpoints").touch())
    for name in ("30", "abc", "30.orbax-checkpoint-tmp"):
        yield f"checkpoints/{name} is an empty directory", train, lambda w, n=name: (w / "checkpoints" / n).mkdir()
        yield f"checkpoints/{name} is a file", train, lambda w, n=name: (w / "checkpoints" / n).touch()
    yield (
        "a link that leads to itself",
        sample,
        lambda w: (w / "samples/step_20.npz.part").symlink_to("step_20.npz.part"),
    )


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def judged(name: str, ended: faults.Ended, made: pathlib.Path, expected: dict[str, np.ndarray]) -> faults.Trial:
    """A trial whose process ended well is right if the samples are those of the undamaged workdir."""
    verdict, detail = faults.verdict(ended)
    if verdict == "right":
        newest = max((p for p in made.glob("step_??.npz")), key=lambda p: p.name, default=None)
        samples = None if newest is None else np.load(newest)["arr_0"]
        if newest is None or newest.name not in expected or not np.array_equal(samples, expected[newest.name]):
            verdict, detail = "silent", f"samples of {newest} differ"
    elif verdict == "told" and ended.seconds > SECONDS:
        detail += f" ({ended.seconds:.0f} s)"
    return faults.Trial(name, verdict, detail)


def trials() -> Iterator[faults.Trial]:
    with tempfile.TemporaryDirectory() as place:
        root, cache = pathlib.Path(place), pathlib.Path(place) / "cache"
        whole, longer = root / "whole", root / "longer"
        assert command(whole, cache=cache).code == 0
        assert command(whole, "--mode=evaluate", cache=cache).code == 0
        shutil.copytree(whole, longer)
        assert command(longer, LONGER, cache=cache).code == 0
        expected = {p.name: np.load(p)["arr_0"] for w in (whole, longer) for p in (w / "samples").glob("*.npz")}
        partial(whole, cache)

        def tried(case: tuple[str, list[str], Callable[[pathlib.Path], object]]) -> faults.Trial:
            name, flags, damage = case
            with tempfile.TemporaryDirectory(dir=root) as directory:
                copy = pathlib.Path(directory) / "copy"
                shutil.copytree(whole, copy)
                damage(copy)
                return judged(name, command(copy, *flags, cache=cache), copy / "samples", expected)

        with concurrent.futures.ThreadPoolExecutor(max_workers=6) as pool:
            yield from pool.map(tried, damages())
        yield from full_disks(root, whole, cache, expected)


@contextlib.contextmanager
def full_disk(place: pathlib.Path, source: pathlib.Path, *, free: int) -> Iterator[pathlib.Path]:
    """A copy of a directory on a disk of its own with `free` KiB left, and the file that fills it."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], check=True)
    try:
        shutil.copytree(source, place / "copy")
        (place / "fill").write_bytes(bytes(shutil.disk_usage(place).free - free * 1024))
        yield place / "copy"
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


def full_disks(
    root: pathlib.Path, whole: pathlib.Path, cache: pathlib.Path, expected: dict[str, np.ndarray]
) -> Iterator[faults.Trial]:
    """One line, exit code 1, and when there is space again the same command goes on, to the same samples."""
    many = ["--config.sampling.num_samples=20000", "--config.sampling.batch_size=20000", "--mode=sample"]
    often = ["--config.training.num_steps=100000", "--config.training.log_every=1"]
    kinds = {
        "nothing can be written, training": (0, [LONGER]),
        "events and metrics": (8, [*often, "--config.training.checkpoint_every=100000"]),
        "a checkpoint, at once": (12, [LONGER]),
        "a checkpoint, in the background": (60, [LONGER]),
        "a checkpoint, at its end": (200, [LONGER]),
        "nothing can be written, sampling": (0, ["--mode=sample"]),
        "samples under way": (16, many),
        "samples and the report": (12, ["--mode=sample"]),
        "the report": (40, ["--mode=sample"]),
        "an evaluation": (4, ["--mode=evaluate"]),
    }
    for name, (free, flags) in kinds.items():
        with full_disk(root / "disk", whole, free=free) as copy:
            ended = command(copy, *flags, cache=cache)
            verdict, detail = faults.verdict(ended, most_lines=10**6)
            # But for progress, and the rows of the table that could not be written.
            told = [line for line in ended.output.splitlines() if not PROGRESS.match(line)]
            verdict = "wordy" if verdict == "told" and len(told) > 3 else verdict
            yield faults.Trial(f"a full disk: {name}", verdict if verdict != "right" else "silent", detail)
            (copy.parent / "fill").unlink()
            if flags == [LONGER]:
                again = command(copy, *flags, cache=cache)
                yield judged(f"space again: {name}", again, copy / "samples", expected)
