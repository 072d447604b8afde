"""Damaged, hostile and mistaken inputs, and what becomes of each: `python -m benchmarks.faults [part ...]`.

A part is a module here with `trials()`, which yields a `Trial` for each input.  A trial passes if the library read
the input right ('right'), or refused it in one line that names the cause ('told').
"""

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["PASSED", "ROOT", "Ended", "Trial", "run", "verdict"]

ROOT = pathlib.Path(__file__).parents[2]
PASSED = ("right", "told")


class Trial(NamedTuple):
    """One input and what became of it.

    Attributes:
      name: what was wrong with the input.
      verdict: 'right' or 'told'; otherwise 'traceback', 'hang', 'silent' (a wrong result and no word) or 'wordy'.
      detail: the line that was told, or what failed.
    """

    name: str
    verdict: str
    detail: str = ""


class Ended(NamedTuple):
    """How a process ended; `code` is None for one that had to be killed."""

    code: int | None
    output: str
    seconds: float


def run(arguments: Sequence[str], *, seconds: float = 120.0, **environment: str) -> Ended:
    """Run Python with some arguments in the repository's root; stdout and stderr come together."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return Ended(None, (error.stdout or b"").decode(errors="replace"), time.monotonic() - start)
    return Ended(done.returncode, done.stdout, time.monotonic() - start)


def verdict(ended: Ended, *, most_lines: int = 3) -> tuple[str, str]:
    """What a process's end says of it: exit code 1 with one `error: ...` line is 'told', exit code 0 is 'right'."""
    errors = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    if ended.code is None:
        return "hang", f"killed after {ended.seconds:.0f} s"
    if "Traceback" in ended.output or ended.code not in (0, 1):
        return "traceback", (ended.output.splitlines() or [f"exit code {ended.code}"])[-1]
    if ended.code == 0:
        return "right", ""
    if len(errors) != 1:
        return "silent", f"{len(errors)} lines begin with 'error: '"
    if len(ended.output.splitlines()) > most_lines:
        return "wordy", f"{len(ended.output.splitlines())} lines"
    return "told", errors[0]
