"""What goes wrong on clusters, and what is lost: nothing."""

import contextlib
import errno
import fcntl
import json
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import yaml
from test_experiment import ROOT, assert_equal_states, get_config, tiny, untrained

from score_jax import checkpoint, experiment, workdir
from score_jax.errors import UserError

TOY = ["--config=configs/toy2d.py", "--config.network.features=16", "--config.training.batch_size=16"]
TOY += ["--config.training.log_every=1", "--config.training.checkpoint_every=1000000", "--config.sampling.grid=log_snr"]
TOY += ["--config.sampling.num_samples=1000000", "--config.sampling.batch_size=100", "--config.sampling.num_steps=50"]


def test_a_run_that_is_asked_to_end_saves_and_goes_on(tmp_path):
    """In training the step is finished, saved, and the exit code is 0; in sampling so, and what was drawn is kept."""
    metrics, partial = tmp_path / "run/metrics.jsonl", tmp_path / "run/samples/partial.json"

    def lines():
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def drawn():
        return json.loads(partial.read_text())["done"] if partial.exists() else 0

    def heed():  # Where the tests run in the background they ignore these, and so would a process of theirs.
        for asking in (signal.SIGHUP, signal.SIGINT):
            signal.signal(asking, signal.SIG_DFL)

    def asked(num_steps, until, signum, *, insisting=False):
        command = [sys.executable, "run.py", *TOY, f"--config.training.num_steps={num_steps}"]
        options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed)
        process, deadline = subprocess.Popen([*command, f"--workdir={tmp_path / 'run'}"], **options), time.time() + 200
        while not until() and process.poll() is None and time.time() < deadline:
            time.sleep(0.01)
        process.send_signal(signum)
        while insisting and process.poll() is None:
            time.sleep(0.05)
            process.send_signal(signum)
        try:
            return process.communicate(timeout=100)[0], process.returncode
        finally:
            process.kill()

    output, code = asked(1_000_000, lambda: lines() > 3, signal.SIGHUP)
    (step,) = (int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    assert code == 0, output
    assert f"stopped at step {step}; the same command goes on" in output
    assert f'"step": {step},' in metrics.read_text().splitlines()[-1]
    before = lines()
    output, code = asked(1_000_000, lambda: lines() > before, signal.SIGINT, insisting=True)
    assert code == 130, output
    assert output.splitlines()[-1] == "interrupted"
    assert "Traceback" not in output
    output, code = asked(step, lambda: drawn() > 0, signal.SIGTERM)
    assert (code, output.splitlines()[-1]) == (0, f"stopped in sampling; {ON_DISK}")
    kept = drawn()
    output, code = asked(step, lambda: drawn() > kept, signal.SIGINT)
    assert f"going on after {kept} of 1000000 samples" in output
    assert (code, output.splitlines()[-1]) == (0, f"stopped in sampling; {ON_DISK}")


ON_DISK = "the same command goes on after the samples on disk"


def test_killed_at_twenty_moments_equals_never_killed(tmp_path):
    """SIGKILL while it starts, trains and saves, 20 times in one training: the same state, bit for bit, in the end."""
    settings = {"num_steps": 500, "batch_size": 16, "log_every": 5, "checkpoint_every": 5}
    flags = ["--config=configs/toy2d.py", "--config.network.features=16", "--config.sampling.num_samples=4"]
    flags += ["--config.sampling.num_steps=2", "--config.sampling.grid=log_snr"]
    flags += [f"--config.training.{k}={v}" for k, v in settings.items()]

    def start(workdir):
        command = [sys.executable, "run.py", *flags, f"--workdir={workdir}"]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    killed, rng = tmp_path / "killed", np.random.default_rng(0)

    def newest():
        return max((int(p.name) for p in (killed / "checkpoints").glob("*") if p.name.isdigit()), default=0)

    for i in range(20):
        process, deadline, before = start(killed), time.time() + 100, newest()
        # Every fourth at any moment, the others while they train and save.
        while i % 4 and newest() == before and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5 if i % 4 else 6))
        process.kill()
        output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, output
        assert "Traceback" not in output
    output = start(killed).communicate(timeout=300)[0]
    assert "resuming" in output
    assert "report:" in start(tmp_path / "whole").communicate(timeout=300)[0]
    config = get_config("toy2d")
    config.network.features = 16
    config.training.update(settings)
    assert_equal_states(config, killed, tmp_path / "whole", 500)
    rows = [
        [json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()]
        for w in (killed, tmp_path / "whole")
    ]
    assert [row["step"] for row in rows[0]] == list(range(5, 501, 5))
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


def test_a_full_disk_leaves_the_checkpoints_as_they_were(tmp_path):
    """A limit on the size of a file stands for the disk."""
    config = tiny("toy2d")
    config.training.update(num_steps=3)
    experiment.run(config, "train", tmp_path)
    config.training.num_steps = 6
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(
            UserError, match=r"cannot save a checkpoint in .*those before it are as they were: .*too large"
        ):
            experiment.run(config, "train", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert experiment.Run(config, tmp_path).restore()[0] == 3


def test_samples_survive_a_kill(tmp_path, capsys):
    """Half of the samples are made, by a process that ends; the next one makes the other half, and all are the same."""
    config = tiny()
    run = experiment.Run(config, untrained(config, tmp_path))
    params = run.restore()[1].ema
    with run.samples(6, params, 12) as samples:
        expected = np.array(samples)
    assert not list((tmp_path / "samples").iterdir())
    drawn, draw = [], run.draw

    def counting(*inputs):
        drawn.append(len(drawn))
        return draw(*inputs)

    run.draw = counting
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "check_finite", lambda *_: 1 / 0 if run.last else setattr(run, "last", True))
        run.last = False
        with pytest.raises(ZeroDivisionError), run.samples(6, params, 12):
            pass
    capsys.readouterr()
    with run.samples(6, params, 12) as samples:
        np.testing.assert_array_equal(samples, expected)
    assert "going on after 4 of 12 samples" in capsys.readouterr().out
    # Other samples do not go on from these.
    with contextlib.suppress(ZeroDivisionError), run.samples(6, params, 12):
        raise ZeroDivisionError
    with run.samples(7, params, 12) as samples:
        assert len(samples) == 12
    assert "going on" not in capsys.readouterr().out


def test_a_diverged_run_goes_on_with_another_learning_rate(tmp_path, capsys):
    """From the last good checkpoint, which diverged starts do not push out; the change is said and recorded."""
    config = tiny("toy2d")
    config.training.update(num_steps=4, checkpoint_every=1, log_every=1, max_skipped=2, decay="cosine")
    experiment.run(config, "train", tmp_path)
    config.training.update(num_steps=20, learning_rate=1e30)
    with pytest.raises(UserError, match=r"learning_rate is 0.002 there and 1e\+30 here; .* or go on with --retune"):
        experiment.run(config, "train", tmp_path)
    with pytest.raises(UserError, match=r"diverged: the last 3 gradients, up to step \d, .* and --retune"):
        experiment.run(config, "train", tmp_path, retune=True)
    # What the first step led to could not be known as bad when it was saved.
    with pytest.raises(UserError, match=r"none was since the checkpoint of step 5: .*put checkpoints/5 out of the way"):
        experiment.run(config, "train", tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
    (tmp_path / "checkpoints/5").rename(tmp_path / "checkpoints/5.bad")
    capsys.readouterr()
    config.training.update(num_steps=5, learning_rate=1e-3)
    experiment.run(config, "train", tmp_path, retune=True)
    output = capsys.readouterr().out
    assert f"resuming {tmp_path} at step 4" in output
    # The fourth rate, the third after the warm-up, of 4 decaying: 1e-3 (1 + cos(pi 2/4)) / 2.
    assert "the cosine now ends at step 5: the learning rate at step 4 goes from 9.7e+29 to 0.0005" in output
    assert "step 5/5  loss" in output
    changes = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
    name = "training.learning_rate"
    assert changes == [{"step": 4, name: [2e-3, 1e30]}, {"step": 4, name: [1e30, 1e-3]}]
    assert "From step 4 on: training.learning_rate 0.001, before 1e+30." in (tmp_path / "report.html").read_text()
    with pytest.raises(UserError, match=r"--retune is for --mode=train, not for --mode=sample"):
        experiment.run(config, "sample", tmp_path, retune=True)


def damage(directory: pathlib.Path):
    for path in directory.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_set_aside(tmp_path, capsys):
    """By training, as often as it takes; what only reads passes it over, as the run may be under way."""
    config = tiny()
    run = experiment.Run(config, untrained(config, tmp_path))

    def names():
        return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())

    for aside in (["9.damaged"], ["9.damaged", "9.damaged1"]):
        with checkpoint.open_manager(tmp_path / "checkpoints") as manager:
            later = run.first_state()._replace(step=np.int32(9))
            checkpoint.save(manager, 9, later, {})
        assert run.restore()[0] == 9
        damage(tmp_path / "checkpoints/9")
        before = names()
        step, state = run.restore()
        assert (step, int(state.step)) == (6, 0)
        assert "the checkpoint of step 9 is damaged" in capsys.readouterr().out
        assert names() == before
        with checkpoint.open_manager(tmp_path / "checkpoints") as manager:
            assert checkpoint.restore_newest(manager, run.state)[0] == 6
        assert "9 is damaged" in capsys.readouterr().out
        assert names() == ["6", *aside]
        jax.tree.map(np.testing.assert_array_equal, state.params, later.params)
    # Where none can be read, none is set aside, and the reason is told.
    damage(tmp_path / "checkpoints/6")
    with pytest.raises(UserError, match=r"checkpoint of step 6 .* cannot be read"):
        run.restore()
    assert (tmp_path / "checkpoints/6").exists()


def test_two_runs_do_not_train_in_one_directory(tmp_path):
    config = tiny()
    untrained(config, tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    config.training.num_steps = 7
    with workdir.sole_writer(tmp_path), pytest.raises(UserError, match="in training by another process"):
        experiment.run(config, "train", tmp_path)
    assert (tmp_path / "config.yaml").read_text() == before  # The record of the run in progress.


def test_the_config_on_record_is_that_of_training(tmp_path):
    config = tiny("toy2d")
    experiment.run(config, "train", tmp_path)
    config.sampling.num_samples = 3
    experiment.run(config, "sample", tmp_path)
    recorded = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert recorded["sampling"]["num_samples"] == 5
    config.training.num_steps = 7
    experiment.run(config, "train", tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == json.loads(config.to_json())


def test_two_runs_do_not_mix_their_samples(tmp_path):
    """Nor does one that samples keep another from training."""
    config = tiny()
    run = experiment.Run(config, untrained(config, tmp_path))
    params = run.restore()[1].ema
    with run.samples(6, params, 4):
        with pytest.raises(UserError, match=r"in sampling by another process: wait"):
            experiment.run(config, "evaluate", tmp_path)
        with workdir.sole_writer(tmp_path):
            pass
        assert (tmp_path / "samples/partial.npy").exists()
    with run.samples(6, params, 4) as samples:
        assert len(samples) == 4


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with workdir.sole_writer(tmp_path):
        assert "cannot be locked (No locks available): see to it that no other" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "fcntl", None)  # As on Windows.
    with workdir.sole_writer(tmp_path):
        assert re.search(r"cannot be locked \(.*fcntl.*\): see to it that no other", capsys.readouterr().out)
