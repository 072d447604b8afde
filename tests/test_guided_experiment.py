"""Guidance from a config: labels that training drops, classifiers, and what evaluation says of classes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm
from test_experiment import get_config, tiny, untrained

import score_jax as sj
from score_jax import build, data, evaluate, experiment, objective, workdir
from score_jax.errors import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A score of classes as it is before training, and a classifier, hardly trained."""
    root = tmp_path_factory.mktemp("guided")
    experiment.run(classifier_config(), "train", root / "classifier_digits")
    untrained(tiny("vp_digits_conditional"), root / "vp_digits_conditional")
    return root


def classifier_config():
    config = tiny("classifier_digits")
    config.network.update(features=4, multipliers=(1,))
    return config


def guided(runs, **fields):
    config = tiny("vp_digits_conditional")
    config.sampling.guidance.update(classifier=str(runs / "classifier_digits"), **fields)
    return config


class Recorder:
    """A network that says 10 (1 + y), and keeps what it was given."""

    def apply(self, params, x, cond, y, **kwargs):
        self.cond, self.y = cond, y
        return jnp.broadcast_to(10.0 * (1 + y)[:, None, None, None], x.shape)


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_training_drops_the_share_of_labels_that_the_config_says(rate):
    """20,000 labels; the share and the mean time of those dropped within 4.5 standard errors, false alarms < 1e-4."""
    config, network, n = get_config("vp_digits_conditional"), Recorder(), 20_000
    config.training.update(label_dropout=rate, times="draw_uniform")
    labels = jnp.arange(n) % 10
    objective.make_loss(config, sj.VP(), network)({}, jax.random.key(0), {"x": jnp.zeros((n, 2, 2, 1)), "y": labels})
    dropped = np.asarray(network.y) == 10
    np.testing.assert_array_equal(network.y[~dropped], labels[~dropped])
    assert abs(dropped.mean() - rate) <= 4.5 * np.sqrt(rate * (1 - rate) / n)
    if rate:  # One key a draw: which labels are dropped says nothing of the time.
        assert abs(network.cond[dropped].mean() / 999 - 0.5) < 4.5 * np.sqrt(1 / 12 / dropped.sum())


def test_the_unconditional_score_is_that_of_the_label_of_no_class():
    """-net/sigma with net = 10 (1 + y): at y = 2 and for no class, y = 10, guided at scale 3 to 3 * 30 - 2 * 110."""
    config, sde = get_config("vp_digits_conditional"), sj.VP()
    config.sampling.guidance.scale = 3.0
    x, t, y = jnp.zeros((4, 2, 2, 1)), jnp.array(0.5), jnp.full(4, 2)
    score = build.make_guided_score_fn(config, sde, Recorder(), {}, y)(x, t)
    np.testing.assert_allclose(score, 130.0 / np.full(x.shape, sde.sigma(t)), rtol=1e-5)
    config.sampling.guidance.interval = (0.6, 1.0)
    score = build.make_guided_score_fn(config, sde, Recorder(), {}, y)(x, t)
    np.testing.assert_allclose(score, -30.0 / np.full(x.shape, sde.sigma(t)), rtol=1e-5)


def test_the_classifier_of_a_workdir_guides(runs):
    """The likelihood that a run loads is the softmax of its trained network at the labels."""
    run = experiment.Run(guided(runs, name="classifier_guidance"), runs / "vp_digits_conditional")
    other = experiment.Run(classifier_config(), runs / "classifier_digits")
    params = other.restore()[1].ema
    x, t, y = jax.random.normal(jax.random.key(0), (3, 8, 8, 1)), jnp.full(3, 0.25), jnp.array([0, 7, 9])
    logits = np.asarray(jax.jit(other.network.apply)(params, x, 999 * t))
    expected = logits[np.arange(3), y] - np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(jax.jit(run.classifier)(y, x, t), expected, rtol=1e-4, atol=1e-5)
    assert run.classes == 10


def test_samples_of_either_guidance_are_of_classes(runs):
    path = runs / "vp_digits_conditional"
    experiment.run(guided(runs, name="classifier_free_guidance"), "sample", path)
    assert np.load(path / "samples/step_6.npz")["arr_0"].shape == (5, 8, 8, 1)
    experiment.run(guided(runs, name="classifier_guidance", scale=3.0), "evaluate", path)
    assert 0 <= json.loads((path / "evaluation.json").read_text())["class_agreement"]["generated"] <= 1


def test_a_classifier_reports_its_accuracy_and_has_no_samples(runs, capsys):
    path = runs / "classifier_digits"
    table = json.loads((path / "accuracy.json").read_text())
    assert len(table) == 5
    assert not list((path / "samples").iterdir())
    assert "Accuracy" in (path / "report.html").read_text()
    experiment.run(classifier_config(), "evaluate", path)
    assert json.loads((path / "accuracy.json").read_text()) == table
    assert "accuracy_at_0.5" in capsys.readouterr().out
    for mode in ("sample", "likelihood"):
        with pytest.raises(UserError, match="makes a classifier: there are train, evaluate"):
            experiment.run(classifier_config(), mode, path)


def test_accuracy_is_the_share_told_right_at_each_noise_level():
    """Of labels y in 0, 1 at x = 2 y - 1 the sign of x_t tells Phi(alpha/sigma); 20,000 points, 4.5 standard errors."""
    sde, n = sj.VP(), 20_000
    y = np.arange(n, dtype=np.int32) % 2
    dataset = data.Dataset(n, (1,), lambda i: ((2.0 * y[i] - 1)[:, None].astype(np.float32), y[i]))
    logits_fn = jax.tree_util.Partial(lambda x, t: jnp.concatenate([-x, x], axis=1))
    table = evaluate.accuracy(jax.random.key(0), sde, logits_fn, dataset, num_images=n, batch_size=3000, centered=True)
    times = np.linspace(sde.t_min, sde.t_max, 5, dtype=np.float32)
    expected = norm.cdf(sde.alpha(times) / sde.sigma(times))
    np.testing.assert_allclose(list(table.values()), expected, atol=4.5 * np.sqrt(0.25 / n))


def test_class_agreement_is_the_share_of_right_labels():
    """Real digits, the labels of half of them wrong."""
    datasets = [data.load("digits", split) for split in data.SPLITS]
    x, y = datasets[1].read(np.arange(360))
    wrong = np.where(np.arange(360) < 180, y, (y + 1) % 10)
    table = evaluate.against_data(x, datasets, labels=wrong, classifier=True)
    assert 0.47 < table["class_agreement"]["generated"] < 0.53
    assert 0.93 < table["class_agreement"]["real"] < 1


def test_a_class_without_examples_leaves_the_others_their_numbers():
    x, y = np.repeat(np.eye(3), 20, axis=0), np.repeat([0, 2, 3], 20)
    classify = evaluate.logistic_regression(x, y)
    assert classify(np.eye(3)).argmax(axis=1).tolist() == [0, 2, 3]
    dataset = data.Dataset(2, (3,), lambda i: (np.eye(3, dtype=np.float32)[:2][i], np.array([0, -1])[i]))
    with pytest.raises(UserError, match=r"config\.evaluation\.classifier: there are real images without a label"):
        evaluate.against_data(x, [dataset], classifier=True)


def test_a_run_older_than_a_field_goes_on_where_that_is_off(tmp_path):
    old, off, on = ({"training": {"weight": 1.0, **new}} for new in ({}, {"dropout": 0.0}, {"dropout": 0.1}))
    workdir.open_workdir(tmp_path / "a", old)
    workdir.open_workdir(tmp_path / "a", off)
    workdir.open_workdir(tmp_path / "b", old)
    with pytest.raises(UserError, match=r"training\.dropout is None there and 0\.1 here"):
        workdir.open_workdir(tmp_path / "b", on)


def test_mistakes_get_one_line(runs, tmp_path):
    path = runs / "vp_digits_conditional"
    cases = [
        (dict(name="classifier_guidance", classifier=str(path)), "holds no classifier, but a UNet"),
        (dict(name="classifier_free_guidance", interval=(0.5, 0.1)), "t_low < t_high"),
    ]
    for fields, words in cases:
        config = guided(runs)
        config.sampling.guidance.update(**fields)
        with pytest.raises(UserError, match=words) as caught:
            experiment.run(config, "sample", path)
        assert "\n" not in str(caught.value)
    config = tiny("ve_digits")
    config.sampling.guidance.update(name="classifier_guidance", classifier=str(runs / "classifier_digits"))
    with pytest.raises(UserError, match=r"has another config\.sde: .*'VP'.* there and .*'VE'.* here"):
        experiment.run(config, "train", tmp_path / "ve")
    config = tiny("classifier_digits")
    config.training.objective = "denoising_score_matching"
    with pytest.raises(UserError, match="does not train a Classifier"):
        experiment.run(config, "train", tmp_path / "objective")
