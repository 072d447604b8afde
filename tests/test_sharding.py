"""Several devices, and several processes: each in processes of its own, as a backend has one number of devices."""

import json
import os
import re
import resource
import socket
import subprocess
import sys
import time

import numpy as np
from test_experiment import ROOT, assert_equal_states, get_config

from score_jax import data


def test_on_eight_devices():
    """Everything in `eight_devices.py`."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/eight_devices.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-10_000:]


FLAGS = ["--config=configs/vp_digits.py", "--config.network.features=8", "--config.network.multipliers=(1,)"]
FLAGS += ["--config.training.batch_size=16", "--config.training.log_every=1", "--config.training.checkpoint_every=10"]
FLAGS += ["--config.sampling.num_samples=10", "--config.sampling.num_steps=2", "--config.sampling.grid=log_snr"]
FLAGS += ["--config.mesh.fsdp=2", "--config.distributed.enabled=True", "--config.distributed.num_processes=2"]


def start(workdir, num_steps, *, second=(), limit=None):
    """Two processes of four devices each that train together.

    Args:
      workdir: of both.
      num_steps: of training.
      second: flags of the second alone.
      limit: the size of a file, in bytes, beyond which the disk of the first is full.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{found.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    own = [*FLAGS, f"--config.distributed.coordinator={coordinator}", f"--config.training.num_steps={num_steps}"]
    commands = [[sys.executable, "run.py", *own, f"--config.distributed.process_id={i}"] for i in range(2)]
    options = dict(cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    commands[1] += second

    def full():
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return [
        subprocess.Popen([*c, f"--workdir={workdir}"], text=True, preexec_fn=full if i == 0 else None, **options)
        for i, c in enumerate(commands)
    ]


def errors(processes):
    """How processes end, each with exit code 1 and one line on stderr within 60 s: those lines."""
    deadline, found = time.time() + 60, []
    for process in processes:
        output = process.communicate(timeout=max(deadline - time.time(), 1))[1]
        assert process.returncode == 1, output
        (line,) = output.splitlines()
        found.append(line)
    return found


def steps(workdir):
    file = workdir / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def wait_for(condition, processes):
    deadline = time.time() + 200
    while not condition() and time.time() < deadline and all(process.poll() is None for process in processes):
        time.sleep(0.02)


def test_two_processes_one_of_which_is_killed(tmp_path):
    """SIGKILL to one, then both again; SIGTERM to one; against a run that nobody disturbed."""
    processes = start(tmp_path / "killed", 40)
    wait_for(lambda: (tmp_path / "killed/checkpoints/10").exists(), processes)
    processes[0].kill()
    (line,) = errors(processes[1:])
    assert re.match(r"error: (process 0|another process) of this run .*: start all of them again", line)
    processes[0].communicate()
    assert steps(tmp_path / "killed") < 40
    processes = start(tmp_path / "killed", 40)
    before = steps(tmp_path / "killed")
    wait_for(lambda: steps(tmp_path / "killed") > before + 3, processes)
    processes[1].terminate()
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "resuming" in outputs[0][0]
    assert "the same command goes on from there" in outputs[0][0]
    assert "steps/s" not in outputs[1][0]  # One speaks for all.
    for workdir in (tmp_path / "killed", tmp_path / "whole"):
        processes = start(workdir, 40)
        outputs = [process.communicate(timeout=400) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
    config = get_config("vp_digits")
    config.network.update(features=8, multipliers=(1,))
    config.training.batch_size = 16
    assert_equal_states(config, tmp_path / "killed", tmp_path / "whole", 40)
    samples = [np.load(tmp_path / name / "samples/step_40.npz")["arr_0"] for name in ("killed", "whole")]
    np.testing.assert_array_equal(*samples)
    assert samples[0].shape == (10, 8, 8, 1)
    for workdir in (tmp_path / "killed", tmp_path / "whole"):  # One process writes for all.
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, 41))
    assert len(list((tmp_path / "whole").glob("events.out.tfevents.*"))) == 1


def test_two_processes_of_which_one_fails(tmp_path):
    """Both end, and say what was wrong with which."""
    name = "config.training.learning_rate"
    reason = f"{name} is 0.004 in process 0 and 0.001 in process 1: give all processes of a run the same"
    processes = start(tmp_path / "configs", 40, second=[f"--{name}=0.001"])
    assert errors(processes) == [f"error: process 1 of this run ended: {reason}", f"error: {reason}"]
    processes = start(tmp_path / "full", 40, limit=500)  # Bytes: the config fits in no file.
    first, second = errors(processes)
    assert re.match("error: cannot .*/full/.*: File too large", first)
    assert second == f"error: process 0 of this run ended: {first.removeprefix('error: ')}"


def test_each_process_reads_its_part():
    dataset = data.load("digits", "train")
    read = []

    def watched(indices):
        read.append(len(indices))
        return dataset.read(indices)

    rows = np.arange(8, 16)
    part = data.batches(dataset._replace(read=watched), 16, seed=0, rows=rows)
    whole = data.batches(dataset, 16, seed=0)
    for _ in range(3):
        np.testing.assert_array_equal(next(part)["x"], next(whole)["x"][rows])
    assert set(read) == {8}
