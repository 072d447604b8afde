"""What goes wrong on clusters, and what is lost: nothing."""

import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_experiment import ROOT, tiny, untrained

from score_jax import checkpoint, experiment, workdir
from score_jax.errors import UserError


def test_a_terminated_run_saves_where_it_stands(tmp_path):
    """SIGTERM: the step is finished, saved, and the exit code is 0."""
    flags = ["--config=configs/vp_digits.py", "--config.network.features=4", "--config.network.multipliers=(1,)"]
    flags += ["--config.training.batch_size=4", "--config.training.num_steps=1000000", "--config.training.log_every=1"]
    flags += ["--config.training.checkpoint_every=1000000", f"--workdir={tmp_path}"]
    command = [sys.executable, "run.py", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics, deadline = tmp_path / "metrics.jsonl", time.time() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    (step,) = (int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert f"stopped at step {step}; the same command goes on" in output
    assert f'"step": {step},' in metrics.read_text().splitlines()[-1]


def damage(directory: pathlib.Path):
    for path in directory.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_set_aside(tmp_path, capsys):
    config = tiny()
    run = experiment.Run(config, untrained(config, tmp_path))
    with checkpoint.open_manager(tmp_path / "checkpoints") as manager:
        later = run.first_state()._replace(step=np.int32(9))
        checkpoint.save(manager, 9, later, {})
    assert run.restore()[0] == 9
    damage(tmp_path / "checkpoints/9")
    step, state = run.restore()
    assert (step, int(state.step)) == (6, 0)
    assert "the checkpoint of step 9 is damaged" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "9.damaged"]
    jax.tree.map(np.testing.assert_array_equal, state.params, later.params)
    # Where none can be read, none is set aside, and the reason is told.
    damage(tmp_path / "checkpoints/6")
    with pytest.raises(UserError, match=r"checkpoint of step 6 .* cannot be read"):
        run.restore()
    assert (tmp_path / "checkpoints/6").exists()


def test_two_runs_do_not_train_in_one_directory(tmp_path):
    config = tiny()
    untrained(config, tmp_path)
    with workdir.sole_writer(tmp_path), pytest.raises(UserError, match="in training by another process"):
        experiment.run(config, "train", tmp_path)
