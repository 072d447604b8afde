"""Data sets and the pipeline, tensorflow-datasets' real path included."""

import io
import shutil
import subprocess
import sys
import tarfile
import types

import jax
import numpy as np
import pytest
from PIL import Image

from score_jax import data
from score_jax.errors import UserError


def write_cifar(path, rows_a_file=20):
    """A CIFAR-10 archive in the published binary layout, of random images; returns the first file's rows."""
    rng, rows = np.random.default_rng(0), []
    with tarfile.open(path, "w:gz") as tar:
        for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
            labels = rng.integers(0, 10, (rows_a_file, 1))
            rows.append(np.concatenate([labels, rng.integers(0, 256, (rows_a_file, 3072))], axis=1).astype(np.uint8))
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = rows[-1].size
            tar.addfile(info, io.BytesIO(rows[-1].tobytes()))
    return np.concatenate(rows[:5])


def test_cifar10_is_prepared_and_read_without_tensorflow(tmp_path):
    rows = write_cifar(tmp_path / "cifar.tar.gz")
    with pytest.raises(UserError, match=r"python -m score_jax.data cifar10 --data_dir"):
        data.load("cifar10", "train", data_dir=str(tmp_path))
    data.prepare("cifar10", data_dir=str(tmp_path), archive=str(tmp_path / "cifar.tar.gz"))
    train = data.load("cifar10", "train", data_dir=str(tmp_path))
    x, y = train.read(np.arange(100))
    assert (train.size, train.shape, x.dtype) == (100, (32, 32, 3), np.uint8)
    # The files are shuffled: compare as sets of (label, image).
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    expected = {(int(r[0]), image.tobytes()) for r, image in zip(rows, images, strict=True)}
    assert {(int(label), image.tobytes()) for label, image in zip(y, x, strict=True)} == expected
    assert data.load("cifar10", "test", data_dir=str(tmp_path), image_size=16).shape == (16, 16, 3)
    import tensorflow_datasets as tfds

    assert len(tfds.data_source("cifar10", split="train", data_dir=str(tmp_path))) == 100
    assert "tensorflow" not in sys.modules


def test_folder_of_images(tmp_path, capsys):
    for i, name in enumerate(["a/x.png", "b/y.jpg", "b/z.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20 + i, 12), (50 * i, 100, 0)).save(tmp_path / name)
    folder = data.load("folder", "train", data_dir=str(tmp_path), image_size=8)
    x, y = folder.read(np.arange(3))
    assert x.shape == (3, 8, 8, 3)
    assert list(y) == [0, 1, 1]
    assert (x[2] == [100, 100, 0]).all()
    with pytest.raises(UserError, match="differ in size"):
        data.load("folder", "train", data_dir=str(tmp_path)).read(np.arange(3))
    (tmp_path / "a/x.png").write_bytes(b"not an image")
    # The next one stands for it, with its own label.
    x, y = data.load("folder", "train", data_dir=str(tmp_path), image_size=8).read(np.array([0, 2]))
    assert list(y) == [1, 1]
    assert np.abs(x[0].astype(int) - [50, 100, 0]).max() < 5
    assert capsys.readouterr().out.count("a/x.png'; skipped") == 1
    for i in range(11):
        (tmp_path / f"b/bad{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot read the image .*bad8.png: .* and so 11 of 14 images: too many"):
        data.load("folder", "train", data_dir=str(tmp_path), image_size=8).read(np.arange(14))
    with pytest.raises(UserError, match="no images"):
        data.load("folder", "train", data_dir=str(tmp_path / "none"))


def test_the_square_that_is_cropped(tmp_path):
    """Pixels say where they were: of 218 x 178 the central 140, as of the published CelebA, or the largest, 178."""
    place = np.stack(np.broadcast_arrays(np.arange(218)[:, None], np.arange(178), 0), axis=-1).astype(np.uint8)
    Image.fromarray(place).save(tmp_path / "0.png")
    for crop, top, left, side in ((140, 39, 19, 140), (None, 20, 0, 178), (1000, 20, 0, 178)):
        options = {"data_dir": str(tmp_path), "crop": crop}
        image = data.load("folder", "train", image_size=side, **options).read(np.arange(1))[0][0]
        np.testing.assert_array_equal(image, place[top : top + side, left : left + side])
        image = data.load("folder", "train", image_size=2, **options).read(np.arange(1))[0][0].astype(float)
        quarters = [
            [top + (side - 1) / 4, left + (side - 1) / 4],
            [top + 3 * (side - 1) / 4, left + 3 * (side - 1) / 4],
        ]
        np.testing.assert_allclose(image[[0, 1], [0, 1], :2], quarters, atol=3)
    assert data.load("folder", "train", data_dir=str(tmp_path), crop=140).shape == (140, 140, 3)


def test_tensorflow_datasets_of_images_of_many_sizes(tmp_path, monkeypatch):
    """Each is resized, whatever the size of the first."""
    import tensorflow_datasets as tfds

    sizes = [(8, 8), (12, 10), (8, 8), (30, 20)]
    records = [{"image": np.full((*size, 3), i, np.uint8), "label": i} for i, size in enumerate(sizes)]

    class Source(list):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=4)}
    info = types.SimpleNamespace(splits=["train", "test"], features=features)
    builder = types.SimpleNamespace(data_path=tmp_path, info=info, as_data_source=lambda split: Source(records))
    monkeypatch.setattr(tfds, "builder", lambda *_, **__: builder)
    x, y = data.load("celeb_a", "train", image_size=8).read(np.arange(4))
    assert x.shape == (4, 8, 8, 3)
    assert list(x[:, 4, 4, 0]) == list(y) == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"images of 'celeb_a' may differ in size: set config\.data\.image_size"):
        data.load("celeb_a", "train")
    dataset = data.load("celeb_a", "train", image_size=8)
    assert (dataset.num_classes, dataset.class_names) == (4, ("0", "1", "2", "3"))
    # 16 bits, and labels that are not classes.
    features |= {"image": tfds.features.Image(shape=(2, 2, 1), dtype=np.uint16), "label": tfds.features.Text()}
    records[:] = [{"image": np.full((2, 2, 1), 8738, np.uint16), "label": b"a word"}]
    x, y = data.load("celeb_a", "train").read(np.arange(1))
    assert (x.dtype, x[0, 0, 0, 0], y[0]) == (np.uint8, 34, 0)
    features["image"] = tfds.features.Tensor(shape=(2, 2, 1), dtype=np.float32)
    with pytest.raises(UserError, match=r"'celeb_a' has no 'image' of 8 or 16 bits; it has image, label"):
        data.load("celeb_a", "train")


def test_preparing_what_needs_tensorflow_is_one_line(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def download_and_prepare(**_):
        raise ImportError("No module named 'tensorflow'\nplease install it")

    monkeypatch.setattr(
        tfds, "builder", lambda *_, **__: types.SimpleNamespace(download_and_prepare=download_and_prepare)
    )
    with pytest.raises(UserError, match=r"TensorFlow as a rule \(No module.*file_format='array_record'") as caught:
        data.prepare("mnist", data_dir=str(tmp_path))
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"unknown data set 'mnits'; did you mean 'mnist'"):
        data.prepare("mnits", data_dir=str(tmp_path))


def write_images(root, names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * (i + 1), 0, 0)).save(root / name)


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_the_test_split_of_a_folder(test, tmp_path, capsys):
    write_images(tmp_path, ["train/a/0.png", "train/b/1.png", f"{test}/a/2.png"])
    train, held_out = (data.load("folder", split, data_dir=str(tmp_path)) for split in data.SPLITS)
    assert sorted(train.read(np.arange(train.size))[0][:, 0, 0, 0]) == [10, 20]
    assert sorted(held_out.read(np.arange(held_out.size))[0][:, 0, 0, 0]) == [30]
    assert not train.undivided
    assert not held_out.undivided
    assert not capsys.readouterr().out
    shutil.rmtree(tmp_path / test)
    with pytest.raises(UserError, match=r"has no folder for the split 'test': test or val or validation"):
        data.load("folder", "test", data_dir=str(tmp_path))


def test_an_undivided_folder_is_said(tmp_path, capsys):
    write_images(tmp_path, [f"{i}.png" for i in range(8)])
    train, test = (data.load("folder", split, data_dir=str(tmp_path)) for split in data.SPLITS)
    assert capsys.readouterr().out.count("the test split is all images, those trained on") == 1
    np.testing.assert_array_equal(train.read(np.arange(8))[0], test.read(np.arange(8))[0])
    assert train.undivided
    assert test.undivided


def test_digits_are_split_once():
    train, test = (data.load("digits", split).read(slice(None)) for split in data.SPLITS)
    assert (len(train[0]), len(test[0])) == (1437, 360)
    together = np.concatenate([train[0], test[0]])
    from sklearn.datasets import load_digits

    original = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(x.tobytes() for x in together) == sorted(x.tobytes() for x in original)


@pytest.mark.parametrize("name", ["two_moons", "checkerboard"])
def test_toys_are_centred(name):
    x, y = data.load(name, "train").read(slice(None))
    assert x.dtype == np.float32
    assert (np.abs(x.mean(0)) < 0.05).all()
    assert set(y) <= set(range(4))


def test_scaling_and_back():
    x = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    for centered in (False, True):
        y = data.to_float(x, centered=centered)
        assert (y.min(), y.max()) == (-1.0 if centered else 0.0, 1.0)
        np.testing.assert_array_equal(data.to_uint8(y, centered=centered), x)
    noisy = data.augment(jax.random.key(0), x, centered=False, random_flip=False, dequantize=True)
    np.testing.assert_array_equal(np.floor(noisy * 256), x)  # In [k/256, (k + 1)/256).
    assert noisy.dtype == np.float32


def test_flips_mirror_half_of_the_images():
    """400 draws: the share is within 4 standard errors, 0.1, of a half."""
    x = np.tile(np.arange(4, dtype=np.uint8).reshape(1, 1, 4, 1), (400, 1, 1, 1))
    y = data.augment(jax.random.key(0), x, centered=False, random_flip=True, dequantize=False)
    y = np.round(255 * np.asarray(y))
    flipped = y[:, 0, 0, 0] == 3
    assert abs(flipped.mean() - 0.5) < 0.1
    np.testing.assert_allclose(y[flipped][0, 0, :, 0], [3, 2, 1, 0])


def test_batches_cover_each_epoch_and_resume():
    x = np.arange(10, dtype=np.float32)[:, None]
    dataset = data.Dataset(10, (1,), lambda i: (x[i], np.zeros(len(i), np.int32)))

    def start():
        return data.batches(dataset, 4, seed=0)

    batches = start()
    seen = np.concatenate([next(batches)["x"][:, 0] for _ in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    state, following = batches.get_state(), next(batches)["x"]
    again = start()
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["x"], following)


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("cifar1", "train", "did you mean 'cifar10'"),
        ("digit", "train", "'digits'"),
        ("digits", "tests", "'test'"),
        ("zzzz", "train", r"there are checkerboard, digits, folder, two_moons, \d+ of tensorflow-datasets"),
        ("cifar10/foo", "train", "unknown data set 'cifar10/foo': .*BuilderConfig foo not found"),
        ("cifar10:9.9.9", "train", "unknown data set 'cifar10:9.9.9': .*at version 9.9.9"),
    ],
)
def test_unknown_names(name, split, words):
    with pytest.raises(UserError, match=words):
        data.load(name, split)


def test_importing_the_package_is_light():
    heavy = "'tensorflow', 'torch', 'matplotlib', 'sklearn'"
    code = f"import sys, score_jax; sys.exit(', '.join(m for m in ({heavy}) if m in sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr.strip() == ""
    )
