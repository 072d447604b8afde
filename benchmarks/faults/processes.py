"""Runs of one and of two processes that are killed, interrupted, misled or short of disk, at many moments.

A process passes if it ends within 60 s with one line on stderr that names the cause and exit code 1, or, asked to end,
with 0 (130 where it had nothing to save).
"""

import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from benchmarks.faults import ROOT, Trial

TOY = ["--config=configs/toy2d.py", "--config.network.features=16", "--config.training.batch_size=16"]
TOY += ["--config.training.log_every=1", "--config.training.checkpoint_every=20", "--config.sampling.grid=log_snr"]
TOY += ["--config.training.num_steps=1000000", "--config.sampling.num_samples=8", "--config.sampling.num_steps=2"]
DELAYS = (1, 4, 8, 12, 16, 20, 25)  # Seconds from the start: imports, meeting, compilation, training and saving.


def start(workdir: str, count: int, *, own: Sequence[Sequence[str]] = ((), ()), limit: int = 0) -> list:
    """Processes that train together; `own` are flags of each, `limit` bytes are the longest file of the first."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{found.getsockname()[1]}"
    several = ["--config.distributed.enabled=True", f"--config.distributed.num_processes={count}"]
    several += [f"--config.distributed.coordinator={coordinator}"]
    processes = []
    for i in range(count):
        flags = [*TOY, f"--workdir={workdir}", *own[i]]
        flags += [*several, f"--config.distributed.process_id={i}"] if count > 1 else []
        full = lambda i=i: limit and i == 0 and resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
        options = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        command = [sys.executable, "run.py", *flags]
        processes.append(subprocess.Popen(command, env=environment, text=True, preexec_fn=full, **options))
    return processes


def judge(name: str, processes: list, codes: Sequence[int], words: str = "") -> Iterator[Trial]:
    """A trial for each process, all of which must end within 60 s."""
    deadline = time.monotonic() + 60
    for i, process in enumerate(processes):
        try:
            output = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))[1]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            yield Trial(f"{name}, process {i}", "hang")
            continue
        # JAX says that it heard SIGTERM.
        lines = [line for line in output.splitlines() if "preemption" not in line]
        if process.returncode == -signal.SIGKILL:
            continue
        found = "right" if process.returncode == 0 else "told"
        if "Traceback" in output or process.returncode not in codes:
            found = f"exit {process.returncode}"
        elif len(lines) > 1:
            found = "wordy"
        elif process.returncode and words not in output:
            found = "silent"
        yield Trial(f"{name}, process {i}", found, lines[-1] if lines else "")


def trials() -> Iterator[Trial]:
    with tempfile.TemporaryDirectory() as directory:
        for count in (1, 2):
            for signum, codes in ((signal.SIGINT, (0, 130, 1)), (signal.SIGTERM, (0, -signal.SIGTERM, 1))):
                for delay in DELAYS:
                    processes = start(f"{directory}/{signum.name}{count}{delay}", count)
                    time.sleep(delay)
                    processes[-1].send_signal(signum)
                    yield from judge(f"{signum.name} to one of {count} after {delay} s", processes, codes)
        for delay in DELAYS[2:]:
            for killed in (0, 1):
                processes = start(f"{directory}/kill{killed}{delay}", 2)
                time.sleep(delay)
                processes[killed].kill()
                yield from judge(f"SIGKILL to {killed} after {delay} s", processes, (1,), "of this run")
        for flag in (
            "--config.seed=1",
            "--config.sde.beta_max=19.0",
            "--mode=sample",
            "--config.training.batch_size=32",
        ):
            processes = start(f"{directory}/{flag[2:]}", 2, own=([], [flag]))
            yield from judge(f"{flag} for one", processes, (1,), flag.split("=")[0].lstrip("-"))
        for limit in (100, 2000, 20_000, 40_000):
            processes = start(f"{directory}/limit{limit}", 2, limit=limit)
            yield from judge(f"files of {limit} bytes", processes, (1,), "cannot")
