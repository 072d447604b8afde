"""A full disk and damaged files: one line, or made anew; and what made samples is said beside them."""

import contextlib
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboardX.proto import event_pb2
from test_data import write_cifar
from test_experiment import ROOT, get_config, tiny, untrained

from score_jax import data, disk, experiment, log, provenance, report, sample_files, workdir
from score_jax.errors import UserError

TINY = ["run.py", "--config=configs/toy2d.py", "--config.network.features=8", "--config.sampling.grid=log_snr"]
TINY += ["--config.sampling.num_steps=2", "--config.training.batch_size=8"]
METRICS = {"loss": 1.0, "grad_norm": 1.0, "steps_per_second": 1.0, "skipped": 0}


@pytest.fixture
def small_disk(tmp_path):
    """`fill(free)` leaves so many KiB of a disk of 4 MiB, which holds nothing else."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")

    def fill(free):
        (place / "fill").unlink(missing_ok=True)
        (place / "fill").write_bytes(bytes(shutil.disk_usage(place).free - free * 1024))
        return place

    yield fill
    subprocess.run(["umount", "-l", str(place)], check=True)


def ends(*command):
    """The exit code and the lines of a process, but for those of progress."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    lines = (done.stdout + done.stderr).splitlines()
    return done.returncode, [line for line in lines if not line.startswith(("step ", "resuming", "Download"))]


def test_a_full_disk_is_one_line_while_training_saving_and_sampling(small_disk):
    """It was a hang for ever, some 400 lines, and a signal."""
    run = f"--workdir={small_disk(24)}/run"
    often = ["--config.training.num_steps=1000000", "--config.training.log_every=1"]
    code, lines = ends(*TINY, run, *often, "--config.training.checkpoint_every=1000000")
    assert (code, len(lines)) == (1, 1), lines
    assert "No space left on device (free some space, and the same command goes on)" in lines[0]
    small_disk(60)
    code, lines = ends(*TINY, run, "--config.training.num_steps=4", "--config.sampling.num_samples=4")
    assert (code, len(lines)) == (1, 1), lines
    assert lines[0].startswith("error: cannot save a checkpoint in ")
    assert lines[0].endswith("those before it are as they were: No space left on device")
    small_disk(3000)
    code, lines = ends(*TINY, run, "--config.training.num_steps=4", "--config.sampling.num_samples=4")
    assert code == 0, lines
    small_disk(16)
    many = ["--config.sampling.num_samples=20000", "--config.sampling.batch_size=20000"]
    code, lines = ends(*TINY, run, "--config.training.num_steps=4", *many, "--mode=sample")
    assert (code, len(lines)) == (1, 1), lines
    assert "samples/partial.npy: No space left on device" in lines[0]


def test_a_full_disk_is_one_line_while_preparing(small_disk, tmp_path):
    write_cifar(tmp_path / "cifar.tar.gz")
    directory = small_disk(100)
    command = ["-m", "score_jax.data", "cifar10", f"--data_dir={directory}", f"--archive={tmp_path / 'cifar.tar.gz'}"]
    code, lines = ends(*command)
    assert (code, len(lines)) == (1, 1), lines
    assert "error: cannot prepare 'cifar10'" in lines[0]
    assert "No space left on device" in lines[0]


def test_a_full_disk_is_one_line_while_exporting(small_disk, capfd):
    config = get_config("ddpm_digits")
    config.network.update(features=4)
    path = untrained(config, small_disk(3500) / "run")
    small_disk(8)
    capfd.readouterr()
    with pytest.raises(UserError, match=r"cannot read or write .*: No space left on device \(free some space"):
        experiment.run(config, "export", path)
    assert "".join(capfd.readouterr()) == ""


def test_training_goes_on_without_tensorboard(tmp_path, capsys):
    """Its file becomes a directory; metrics, and what was written before, stay."""
    with log.MetricLog(tmp_path, start=0, num_steps=9) as record:
        record(3, METRICS)
        (file,) = tmp_path.glob("events.out.tfevents.*")
        content = file.read_bytes()
        file.unlink()
        file.mkdir()
        record(6, METRICS)
        record(9, METRICS)
    assert capsys.readouterr().out.count("training goes on without TensorBoard's events") == 1
    assert [row["step"] for row in log.read_metrics(tmp_path / "metrics.jsonl")[0]] == [3, 6, 9]
    events = []
    while content:  # Length, its checksum, the event, its checksum.
        (length,) = struct.unpack("<Q", content[:8])
        events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    assert [event.step for event in events] == [0, 1, 3]
    assert {value.tag: value.simple_value for value in events[2].summary.value} == METRICS


DAMAGES = {
    "cut short": lambda array, progress: os.truncate(array, array.stat().st_size - 20),
    "zeros": lambda array, progress: array.write_bytes(bytes(array.stat().st_size)),
    "empty": lambda array, progress: array.write_bytes(b""),
    "missing": lambda array, progress: array.unlink(),
    "foreign": lambda array, progress: np.save(array, np.zeros(3)),
    "no JSON": lambda array, progress: progress.write_bytes(b"{"),
    "a list": lambda array, progress: progress.write_text("[]"),
    "more than there are": lambda array, progress: progress.write_text(
        progress.read_text().replace('"done": 4', '"done": 6')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_samples_under_way_are_made_anew(tmp_path, capsys, damage):
    (tmp_path / "samples").mkdir()
    arguments = (6, 2), np.float32, {"step": 3}
    file = sample_files.SampleFile(tmp_path)
    assert file.start(*arguments) == 0
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    file.append(x[:4])
    assert sample_files.SampleFile(tmp_path).start(*arguments) == 4
    DAMAGES[damage](tmp_path / "samples/partial.npy", tmp_path / "samples/partial.json")
    file = sample_files.SampleFile(tmp_path)
    assert file.start(*arguments) == 0
    assert "starting the samples again: " in capsys.readouterr().out
    file.append(x[:4])
    file.append(x[4:])
    np.testing.assert_array_equal(file.open(), x)


def test_the_report_leaves_out_what_is_damaged(tmp_path, capsys):
    (tmp_path / "samples").mkdir()
    workdir.write_config(tmp_path, {"seed": 0})
    lines = [b'{"step": 1, "loss": 2.0}', b'{"step": 2, "lo', b"\0\0", b'{"step": 3, "loss": 1.0}', b'{"st']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "evaluation.json").write_text('{"fid": ')
    (tmp_path / "likelihood.json").write_text("[1]")
    (tmp_path / "accuracy.json").write_text('{"accuracy": 0.5}')
    (tmp_path / "samples/step_3.png").write_bytes(b"\x89PNG")
    page = report.write_report(tmp_path).read_text()
    assert "Step 3: loss 1." in page
    assert "<h2>Accuracy</h2>" in page
    assert "<h2>Evaluation</h2>" not in page
    out = capsys.readouterr().out
    assert "2 damaged lines are left out" in out
    assert [name in out for name in ("evaluation.json", "likelihood.json", "step_3.png")] == [True] * 3


@pytest.mark.parametrize("content", [b"", b"sde: {name: V", bytes(20), b"- 1\n", b"a: &a [*a]", b"\xff\xfe"])
def test_a_damaged_config_is_told_or_written_anew(tmp_path, capsys, content):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    workdir.open_workdir(tmp_path, {"seed": 0})
    assert "damaged, and nothing is trained yet: it is written anew" in capsys.readouterr().out
    assert yaml.safe_load(file.read_text()) == {"seed": 0}
    file.write_bytes(content)
    (tmp_path / "checkpoints/20").mkdir(parents=True)
    with pytest.raises(UserError, match=r"config.yaml, the record of what was trained, is damaged .*put back a copy"):
        workdir.open_workdir(tmp_path, {"seed": 0})


@pytest.mark.parametrize("position", [[], None, {"next_index": -1}, {"next_index": "7"}, {"next_index": 8}])
def test_a_damaged_position_in_the_data_is_rebuilt(capsys, position):
    toy = data.load("two_moons", "test")
    batches = data.batches(toy, 4, seed=0)
    for _ in range(7):
        next(batches)
    good, expected = batches.get_state(), next(batches)
    again = data.batches(toy, 4, seed=0)
    experiment._seek(again, 7, position)
    assert "is damaged in the checkpoint of step 7: it is rebuilt" in capsys.readouterr().out
    np.testing.assert_array_equal(next(again)["x"], expected["x"])
    experiment._seek(again, 7, good)
    assert capsys.readouterr().out == ""


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    disk.replace(tmp_path / "a.json", "old")
    with contextlib.suppress(ZeroDivisionError), disk.writing(tmp_path / "a.json") as file:
        file.write(b"new" + bytes([1 // 0]))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]
    with pytest.raises(IsADirectoryError) as caught:
        disk.replace(tmp_path, "text")
    told = disk.told(caught.value, pathlib.Path("w"))
    assert "Is a directory (move it away, or choose another directory)" in str(told)


def test_names_and_captions_say_what_made_the_samples(tmp_path):
    """The newest have the plain name; those of another sampler before them get one of their own; none is lost."""
    config = {"seed": 0, "training": {"ema_decay": 0.9}}
    config["sampling"] = {"sampler": {"name": "heun"}, "guidance": {"name": ""}, "grid": "karras", "num_steps": 9}
    config["sampling"] |= {"num_samples": 2, "t_min": 0.001, "denoise": True}
    ddim = json.loads(json.dumps(config))
    ddim["sampling"]["sampler"] = {"name": "ddim", "eta": 0.5}
    ddim["sampling"]["guidance"] = {"name": "classifier_free_guidance", "scale": 2.0, "interval": None}
    (tmp_path / "samples").mkdir()
    workdir.write_config(tmp_path, config)
    zeros, ones = np.zeros((2, 4, 4, 1), np.uint8), np.ones((3, 4, 4, 1), np.uint8)
    for images, made in ((zeros, config), (ones, ddim), (ones, ddim)):  # The same again overwrite themselves.
        assert sample_files.save_samples(tmp_path, 30, images, provenance.of_samples(made, 30)).name == "step_30.png"

    def stored():
        files = sorted((tmp_path / "samples").glob("*.npz"), key=lambda path: len(path.name))
        return {path.name[:11]: np.load(path)["arr_0"].max() for path in files}

    assert stored() == {"step_30.npz": 1, "step_30_heu": 0}
    page = report.write_report(tmp_path).read_text()
    assert (
        "<p>samples 2, sampler heun, grid karras, steps 9, t min 0.001, last step denoising, seed 0, parameters" in page
    )
    assert (
        "<p>samples 3, sampler ddim(eta=0.5), guidance classifier_free_guidance(scale=2.0), grid karras, steps 9"
        in page
    )
    sample_files.save_samples(tmp_path, 30, zeros, provenance.of_samples(config, 30))
    assert stored() == {"step_30.npz": 0, "step_30_ddi": 1}
    assert len(list((tmp_path / "samples").iterdir())) == 4
    Image.open(tmp_path / "samples/step_30.png").verify()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (dict(sampler=dict(name="heun")), 2 * 4 + 1),
        (dict(sampler=dict(name="unipc"), denoise=False), 4),
        (dict(sampler=dict(name="ancestral"), corrector=dict(name="langevin_corrector", num_steps=3)), 4 * 4 + 1),
        (dict(sampler=dict(name="picard")), None),
        (dict(sampler=dict(name="adaptive_sde")), None),
    ],
)
def test_evaluations_are_counted(sampling, expected, tmp_path):
    config = tiny("toy2d")
    with config.unlocked():
        config.sampling.update(num_steps=4, **sampling)
    assert experiment.Run(config, tmp_path).num_evaluations() == expected
