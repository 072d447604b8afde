"""The modes that edit images, on a network before training: files, known pixels, mistakes in one line."""

import json

import numpy as np
import pytest
from PIL import Image
from test_experiment import tiny, untrained

from score_jax import data, edit, experiment, ode, report
from score_jax.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return untrained(tiny(), tmp_path_factory.mktemp("runs") / "tiny")


def edited(workdir, mode, **editing):
    config = tiny()
    config.editing.update(editing)
    experiment.run(config, mode, workdir)
    assert Image.open(workdir / f"samples/{mode}_6.png").size[0] > 100
    arrays = np.load(workdir / f"samples/{mode}_6.npz")
    assert {(x.shape, x.dtype.name) for x in arrays.values()} == {(arrays["original"].shape, "uint8")}
    return arrays["original"], arrays["degraded"], arrays["restored"]


def test_inpainting_changes_what_is_hidden_only(trained, tmp_path, capsys):
    hidden = np.zeros((8, 8), bool)
    hidden[2:6, 2:6] = True
    original, degraded, restored = edited(trained, "inpaint", mask="center")
    np.testing.assert_array_equal(original, data.load("digits", "test").read(np.arange(5))[0])
    for x in (degraded, restored):
        np.testing.assert_array_equal(x[:, ~hidden], original[:, ~hidden])
    assert set(degraded[:, hidden].ravel()) == {128}
    assert (restored[:, hidden] != original[:, hidden]).mean() > 0.5
    assert "inpaint: " in capsys.readouterr().out
    assert "<h2>Inpaint, step 6</h2>" in (trained / "report.html").read_text()
    # The mask as a file, and images of other sizes from a folder.
    Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)).save(tmp_path / "mask.png")
    (tmp_path / "images").mkdir()
    for i, size in enumerate([(8, 8), (30, 20)] * 2):
        Image.new("RGB", size, (0, 0, 85 * i)).save(tmp_path / f"images/{i}.png")
    original, _, restored = edited(trained, "inpaint", mask=str(tmp_path / "mask.png"), images=str(tmp_path / "images"))
    assert original.shape == (4, 8, 8, 1)
    np.testing.assert_array_equal(restored[:, ~hidden], original[:, ~hidden])


def test_masks():
    at = (np.arange(8) + 0.5) / 8
    hidden = {name: mask(at[:, None], at[None], np.random.default_rng(0)) for name, mask in edit.MASKS.items()}
    np.testing.assert_array_equal(hidden["left"], np.broadcast_to(np.arange(8) < 4, (8, 8)))
    assert hidden["center"].sum() == 16
    assert hidden["center"][2:6, 2:6].all()
    assert 16 < hidden["random"].sum() < 48  # Of 64 fair coins, but for 3 in 100,000 cases.


@pytest.mark.parametrize(("operator", "method"), [("mask", "mmps"), ("downsample", "dps")])
def test_restoring(trained, operator, method):
    original, degraded, _ = edited(
        trained, "restore", operator={"name": operator}, method={"name": method}, noise_std=0.2
    )
    if operator == "mask":  # Noise is where there is a measurement, and nowhere else.
        assert set(degraded[:, 2:6, 2:6].ravel()) == {128}
        assert (degraded[:, :2] != original[:, :2]).mean() > 0.5
    if operator == "downsample":
        x = data.to_float(original, centered=True)
        means = np.repeat(np.repeat(x.reshape(5, 4, 2, 4, 2, 1).mean(axis=(2, 4)), 2, axis=1), 2, axis=2)
        # Noise 0.2 in squares of 2 x 2: uint8 clips some of it.
        noise = (data.to_float(degraded, centered=True) - means)[np.abs(means) < 0.5]
        assert 0.12 < noise.std() < 0.28


def test_what_restores_badly_is_counted(trained, capsys):
    """A fresh network knows nothing of digits: exact conjugate gradients still fit, two iterations may not."""
    edited(trained, "restore", noise_std=0.1)
    numbers = json.loads((trained / "restore.json").read_text())
    assert (numbers["images"], numbers["step"], numbers["off_range"]) == (5, 6, 0)
    run, printed = experiment.Run(tiny(), trained), capsys.readouterr().out
    assert ("do not fit their measurements" in printed) == (numbers["misfits"] > 0)
    restored = np.zeros((4, 8, 8, 1))
    restored[1, 0, 0] = 2.1
    edit._count_failures(run, "restore", 6, restored, np.array([0.1, 0.19, 0.21, 7.0]))
    printed = capsys.readouterr().out
    assert "restore: 2 of 4 images do not fit their measurements: |y - A x| is above 0.2, root mean square" in printed
    assert "restore: 1 of 4 images leave the range of the data, [-1, 1]" in printed
    assert "misfits" in report.write_report(trained).read_text()
    restored[2] = np.nan
    with pytest.raises(UserError, match="restore: 1 of 4 images are not finite"):
        edit._count_failures(run, "restore", 6, restored, np.ones(4))


@pytest.mark.parametrize("mode", ["inpaint", "restore"])
def test_an_image_is_edited_alike_in_any_batch(trained, mode):
    found = []
    for size in (5, 2):
        config = tiny()
        config.sampling.batch_size = size
        experiment.run(config, mode, trained)
        found.append(np.load(trained / f"samples/{mode}_6.npz")["restored"].astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1


def test_color(trained, tmp_path):
    with pytest.raises(UserError, match="--mode=colorize needs images in color, but those of 'digits' have one"):
        experiment.run(tiny(), "colorize", trained)
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{i}.png")
    config = tiny()
    config.data.update(name="folder", dir=str(tmp_path / "images"))
    experiment.run(config, "colorize", untrained(config, tmp_path / "run"))
    arrays = np.load(tmp_path / "run/samples/colorize_6.npz")
    original, degraded, restored = (arrays[name].astype(float) for name in ("original", "degraded", "restored"))
    assert np.ptp(degraded, axis=-1).max() == 0
    np.testing.assert_allclose(degraded.mean(axis=-1), original.mean(axis=-1), atol=0.5)
    inside = (restored > 0).all(axis=-1) & (restored < 255).all(axis=-1)  # Others were clipped.
    np.testing.assert_allclose(restored.mean(axis=-1)[inside], original.mean(axis=-1)[inside], atol=0.6)


def test_interpolation_ends_with_its_images(trained, monkeypatch):
    """A network before training says eps = 0: codes are the images times alpha ratios, and so is all between."""
    config = tiny()
    config.editing.num_between = 1
    experiment.run(config, "interpolate", trained)
    arrays = np.load(trained / "samples/interpolate_6.npz")
    assert list(arrays) == ["0.00", "0.50", "1.00"]
    images = data.load("digits", "test").read(np.arange(4))[0].reshape(2, 2, 8, 8, 1)
    for name, i in (("0.00", 0), ("1.00", 1)):
        np.testing.assert_allclose(arrays[name].astype(int), images[:, i], atol=1)
    # A pair at a time.
    shapes, encode = [], ode.ode_encode
    monkeypatch.setattr(ode, "ode_encode", lambda sde, fn, x, **_: shapes.append(x.shape) or encode(sde, fn, x, **_))
    config.sampling.batch_size = 1
    experiment.run(config, "interpolate", trained)
    assert shapes == [(1, 8, 8, 1)]
    for name, x in np.load(trained / "samples/interpolate_6.npz").items():
        np.testing.assert_allclose(x.astype(int), arrays[name], atol=1)
    config.editing.temperature = 0.0
    with pytest.raises(UserError, match=r"config\.editing\.temperature must be a finite number, above 0, got 0.0"):
        experiment.run(config, "interpolate", trained)


MISTAKES = {
    "mask=centre": "config.editing.mask: neither a mask nor a file: 'centre'; did you mean 'center'",
    "images=nowhere.png": "cannot read the image nowhere.png",
    "operator.name=blurr": "config.editing.operator: unknown name 'blurr'; did you mean 'blur'",
    "method.name=mmp": "config.editing.method: unknown name 'mmp'; did you mean 'mmps'",
    "noise_std=-1.0": r"config\.editing\.noise_std must be a finite number, at least 0, got -1\.0",
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_mistakes_get_one_line(trained, setting):
    config = tiny()
    field, value = setting.split("=")
    config.update_from_flattened_dict({f"editing.{field}": float(value) if field == "noise_std" else value})
    with pytest.raises(UserError, match=MISTAKES[setting]) as caught:
        experiment.run(config, "inpaint" if field in ("mask", "images") else "restore", trained)
    assert "\n" not in str(caught.value)


def test_other_mistakes(trained, tmp_path):
    config = tiny()
    config.editing.operator = {"name": "downsample", "factor": 3}
    with pytest.raises(UserError, match=r"config\.editing\.operator: .*divisible by it, got 8 x 8"):
        experiment.run(config, "restore", trained)
    with pytest.raises(UserError, match="editing needs images, and 'two_moons' has none"):
        experiment.run(tiny("toy2d"), "inpaint", tmp_path / "vectors")
