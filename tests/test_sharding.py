"""Several devices, and several processes: each in processes of its own, as a backend has one number of devices."""

import json
import os
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


def start(workdir, num_steps):
    """Two processes of four devices each that train together."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{found.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    own = [*FLAGS, f"--config.distributed.coordinator={coordinator}", f"--config.training.num_steps={num_steps}"]
    commands = [[sys.executable, "run.py", *own, f"--config.distributed.process_id={i}"] for i in range(2)]
    options = dict(cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return [subprocess.Popen([*c, f"--workdir={workdir}"], text=True, **options) for c in commands]


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
    processes[1].kill()
    time.sleep(1)
    for process in processes:
        process.kill()  # The first one waits for the other; a scheduler ends it.
        process.communicate()
    assert steps(tmp_path / "killed") < 40
    processes = start(tmp_path / "killed", 40)
    before = steps(tmp_path / "killed")
    wait_for(lambda: steps(tmp_path / "killed") > before + 3, processes)
    processes[1].terminate()
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "resuming" in outputs[0]
    assert "the same command goes on from there" in outputs[0]
    assert "steps/s" not in outputs[1]  # One speaks for all.
    for workdir in (tmp_path / "killed", tmp_path / "whole"):
        processes = start(workdir, 40)
        outputs = [process.communicate(timeout=400)[0] for process in processes]
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
