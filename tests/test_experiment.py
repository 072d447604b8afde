"""The whole slice on tiny networks: modes, files, resuming, and mistakes in one line each."""

import importlib
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import yaml
from ml_collections import ConfigDict
from PIL import Image
from scipy.spatial.distance import pdist
from test_data import write_cifar, write_images

from score_jax import build, checkpoint, data, evaluate, experiment, features, objective, report
from score_jax.errors import UserError
from score_jax.networks.inception import Features

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "base")


def get_config(name, *argument):
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"configs.{name}").get_config(*argument)


def tiny(name="vp_digits"):
    """An experiment that compiles and runs in seconds."""
    config = get_config(name)
    if config.network.name in ("UNet", "NCSNpp"):
        config.network.update(features=4, multipliers=(1,), num_blocks=1, attention_at=())
    config.training.update(num_steps=6, batch_size=4, log_every=2, checkpoint_every=3, warmup_steps=1, decay="constant")
    config.sampling.update(grid="log_snr", num_steps=2, num_samples=5, batch_size=4)
    config.evaluation.num_samples = 8
    return config


def untrained(config, workdir):
    """A workdir as training leaves it at step 6, but for the training: nothing but the initialisation compiles."""
    run = experiment.Run(config, workdir)
    with checkpoint.open_manager(workdir / "checkpoints") as manager:
        checkpoint.save(manager, 6, jax.jit(run.init_state)(), {})
    return workdir


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    experiment.run(tiny(), "train", workdir)
    return workdir


def test_a_workdir_holds_what_the_readme_says(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert {"step", "loss", "grad_norm", "steps_per_second"} <= set(rows[0])
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["3", "6"]
    assert list(trained.glob("events.out.tfevents.*"))
    samples = np.load(trained / "samples/step_6.npz")["arr_0"]
    assert (samples.shape, samples.dtype) == ((5, 8, 8, 1), np.uint8)
    assert Image.open(trained / "samples/step_6.png").size[0] > 100
    page = (trained / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "data:image/png;base64" in page
    assert "beta_max" in page
    Image.new("RGB", (8, 8)).save(trained / "samples/my_best.png")  # Somebody's, and left alone.
    Image.new("RGB", (8, 8)).save(trained / "samples/step_6_best.png")
    page = report.write_report(trained).read_text()
    assert page.count("data:image/png;base64") == 1


def test_sampling_and_evaluating_use_the_checkpoint(trained, capsys):
    before = (trained / "samples/step_6.npz").read_bytes()
    experiment.run(tiny(), "sample", trained)
    assert (trained / "samples/step_6.npz").read_bytes() == before  # The same key, the same samples.
    experiment.run(tiny(), "evaluate", trained)
    table = json.loads((trained / "evaluation.json").read_text())
    assert table["num_samples"]["generated"] == 8
    assert table["frechet_distance_pixels"]["generated"] > table["frechet_distance_pixels"]["real"] > 0
    assert "real against real" in (trained / "report.html").read_text()
    assert "classifier_score" in capsys.readouterr().out


def test_an_undivided_folder_is_evaluated_on_once(tmp_path, monkeypatch):
    """Both of its splits are all images: each of them is compared with once."""
    write_images(tmp_path / "images", [f"{i}.png" for i in range(8)])
    config = tiny()
    config.data.update(name="folder", dir=str(tmp_path / "images"))
    config.evaluation.classifier = False
    real = []
    monkeypatch.setattr(
        evaluate, "compare", lambda generated, x, **_: real.append(x) or {"n": dict.fromkeys(("generated", "real"), 4)}
    )
    experiment.run(config, "evaluate", untrained(config, tmp_path / "run"))
    assert sorted(np.round(real[0][:, 0, 0, 0] * 127.5 + 127.5)) == [10 * (i + 1) for i in range(8)]


def test_evaluating_by_features(trained, tmp_path, monkeypatch):
    """From a config's fields to a table; the network of features is a stand-in."""

    @jax.jit
    def means(x):
        rows = x.mean(axis=2).reshape(len(x), -1)
        return Features(rows, rows)

    toy = features.Extractor("efficientnet_lite0", jax.tree_util.Partial(means))
    monkeypatch.setattr(features, "efficientnet_lite0", lambda weights: toy)
    config = tiny()
    config.evaluation.update(features="efficientnet_lite0", statistics=str(tmp_path / "digits.npz"))
    experiment.run(config, "evaluate", trained)
    table = json.loads((trained / "evaluation.json").read_text())
    assert table["num_samples"] == {"generated": 8, "real": 8}
    row = table["frechet_distance_efficientnet_lite0"]
    assert row["generated"] > row["real"] > 0
    digits = data.load("digits", "train")
    with np.load(tmp_path / "digits.npz") as file:
        expected = digits.read(np.arange(digits.size))[0].mean(axis=(0, 2, 3))
        np.testing.assert_allclose(file["mu"], np.repeat(expected, 3), rtol=1e-4)
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5))
    config.evaluation.statistics = str(tmp_path / "other.npz")
    with pytest.raises(UserError, match=r"other.npz has the mean of \(5,\) features, not of \(24,\)"):
        experiment.run(config, "evaluate", trained)
    monkeypatch.setattr(experiment, "MOST_PIXELS", 63)
    config.evaluation.features = "pixels"
    with pytest.raises(UserError, match=r"by their pixels, 64, images are compared up to 63 .*take 'inception'"):
        experiment.run(config, "evaluate", trained)
    config.evaluation.features = "inceptionv3"
    with pytest.raises(UserError, match=r"config\.evaluation\.features: .*'inceptionv3'; did you mean 'inception'"):
        experiment.run(config, "evaluate", trained)
    config.evaluation.features = "inception"
    with pytest.raises(UserError, match=r"config\.evaluation\.weights: inception needs weights"):
        experiment.run(config, "evaluate", trained)


def test_a_learned_grid_is_of_the_network(tmp_path):
    """The published default: another network, another grid; both walk from end to end."""
    config = tiny("toy2d")
    config.sampling.update(grid="curvature", num_steps=5)
    run = experiment.Run(config, tmp_path / "run")
    params = run.init_state().ema
    noisy = jax.tree.map(lambda p: p + 0.02 * jax.random.normal(jax.random.key(0), p.shape), params)
    grids = [np.asarray(run.grid(p)) for p in (params, noisy)]
    for ts in grids:
        assert ts.shape == (6,)
        assert (np.diff(ts) < 0).all()
        np.testing.assert_allclose(ts[[0, -1]], [1.0, config.sampling.t_min])
    assert np.abs(grids[0] - grids[1]).max() > 0.01


def test_likelihood_of_test_images(trained, capsys):
    config = tiny()
    config.evaluation.likelihood.update(rtol=1e-2, atol=1e-2)
    experiment.run(config, "likelihood", trained)
    table = json.loads((trained / "likelihood.json").read_text())
    assert table["num_images"] == 8
    assert table["num_evaluations"] > 6
    assert table["standard_error"] > 0
    assert "bits_per_dim" in capsys.readouterr().out
    config.evaluation.likelihood.divergence = "exakt"
    with pytest.raises(UserError, match=r"config\.evaluation\.likelihood: unknown divergence 'exakt'"):
        experiment.run(config, "likelihood", trained)


def test_going_on_equals_never_stopping(trained, tmp_path):
    """Four steps and then two more, against six: every array of the state bit for bit."""
    config = tiny()
    for config.training.num_steps in (4, 6):
        experiment.run(config, "train", tmp_path / "parts")
    assert_equal_states(config, trained, tmp_path / "parts", 6)


def assert_equal_states(config, first, second, step):
    run = experiment.Run(config, first)
    states = []
    for workdir in (first, second):
        with checkpoint.open_manager(workdir / "checkpoints") as manager:
            assert manager.latest_step() == step
            states.append(checkpoint.restore(manager, step, run.state))
    assert states[0][1] == states[1][1]
    jax.tree.map(np.testing.assert_array_equal, *(state for state, _ in states))


def test_the_cifar_pipeline_end_to_end(tmp_path):
    write_cifar(tmp_path / "cifar.tar.gz")
    data.prepare("cifar10", data_dir=str(tmp_path), archive=str(tmp_path / "cifar.tar.gz"))
    config = tiny("ve_cifar")
    config.data.dir = str(tmp_path)
    config.training.num_steps = 2
    experiment.run(config, "train", tmp_path / "run")
    assert np.load(tmp_path / "run/samples/step_2.npz")["arr_0"].shape == (5, 32, 32, 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds(name):
    config = get_config(name, *(["8"] if name == "progressive_digits" else []))
    sde, network = experiment.make_sde(config), experiment.make_network(config)
    size = 512 if "1024" in name else 64
    x = np.zeros((2, 2) if name == "toy2d" else (2, 8, 8, 1) if "digits" in name else (2, size, size, 3), np.float32)
    y = np.zeros(2, np.int32) if config.network.get("num_classes") else None
    params = jax.eval_shape(network.init, jax.random.key(0), x, np.ones(2), y)
    if name.startswith("classifier"):
        out = jax.eval_shape(network.apply, params, x, np.ones(2))
        assert out.shape == (2, config.network.num_classes)
        return
    score_fn = experiment.make_score_fn(config, sde, network, params, y)
    sampler = experiment.make_sampler(config, sde, score_fn)
    assert callable(sampler.step)
    out = jax.eval_shape(lambda p: experiment.make_score_fn(config, sde, network, p, y)(x, np.float32(0.5)), params)
    assert out.shape == x.shape


def test_edm_begins_with_a_loss_of_one():
    """On data of the config's sigma_data, a dimension's 65,536 terms have variance 2: 4.5 standard errors."""
    config = tiny("edm_digits")
    sde, network = experiment.make_sde(config), experiment.make_network(config)
    x = config.parameterization.sigma_data * jax.random.normal(jax.random.key(0), (1024, 8, 8, 1))
    params = network.init(jax.random.key(1), x[:1], np.ones(1))
    batch = {"x": x, "y": np.zeros(1024, np.int32)}
    loss = jax.jit(objective.make_loss(config, sde, network))(params, jax.random.key(2), batch)
    assert abs(float(loss) - 1) < 4.5 * np.sqrt(2 / x.size)


def test_noise_levels_and_step_size_come_from_the_data(tmp_path, capsys):
    """NCSNv2's techniques, by the numbers that the workdir holds before any training."""
    config = get_config("ncsnv2_digits")
    config.sde.sigma_max = "auto"
    config.sampling.num_steps = 5
    config.sampling.sampler.num_steps = 3
    with pytest.raises(UserError, match="no checkpoint"):
        experiment.run(config, "sample", tmp_path)
    printed = capsys.readouterr().out
    chosen = yaml.safe_load((tmp_path / "config.yaml").read_text())
    x = data.load("digits", "train").read(np.arange(1437))[0].reshape(1437, 64) / 255
    assert chosen["sde"]["sigma_max"] == pytest.approx(pdist(x).max(), rel=1e-5)
    assert f"sigma_max: {chosen['sde']['sigma_max']:.4g}" in printed

    def variance_after_three_steps(e):
        """From that of the level above, in units of a level's own variance."""
        variance = (pdist(x).max() / 0.01) ** (2 / 4)
        for _ in range(3):
            variance = (1 - e) ** 2 * variance + 2 * e
        return variance

    e = chosen["sampling"]["step_size"] / 0.01**2
    best = abs(variance_after_three_steps(e) - 1)
    assert all(abs(variance_after_three_steps(other * e) - 1) > best for other in (0.95, 1.05))
    assert f"step_size: {chosen['sampling']['step_size']:.4g}" in printed
    assert chosen["network"]["sigma_max"] == chosen["sde"]["sigma_max"]
    assert config.sde.sigma_max == config.sampling.step_size == "auto"  # The caller's config is left alone.


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (dict(step_size="auto", num_steps=1), "'auto' needs config.sampling.num_steps >= 2"),
        (dict(step_size="auto", sampler=dict(name="annealed_langevin_corrector")), "'auto' needs .* the num_steps of"),
        (dict(step_size="auto", sampler=dict(name="ddim")), "only 'annealed_langevin_corrector' has one, not 'ddim'"),
        (dict(step_size=1e-3, sampler=dict(name="ddim")), "only 'annealed_langevin_corrector' has one, not 'ddim'"),
    ],
)
def test_a_step_size_needs_what_it_belongs_to(sampling, words):
    config = get_config("ncsn_digits")
    for name, value in sampling.items():
        config.sampling[name] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(UserError, match=rf"^config\.sampling\.step_size: {words}[^\n]*$"):
        experiment.make_sampler(config, experiment.make_sde(config), lambda x, t: -x)


def test_step_size_has_the_published_meaning():
    """At level i, x + a score + sqrt(2 a) z with a = step_size (sigma_i / sigma_L)^2, by two constant scores."""
    config = get_config("ncsnv2_cifar")
    config.sampling.sampler.num_steps = 1
    sde, x = experiment.make_sde(config), np.zeros((1, 1000))

    def step(score, t):
        sampler = experiment.make_sampler(config, sde, lambda x, t: np.full(x.shape, score))
        return sampler.step(jax.random.key(0), x, jax.numpy.array(1.0), t, ())[0]

    for t in (1.0, 0.5, 1e-5):
        a = 6.2e-6 * (float(sde.sigma(t)) / 0.01) ** 2
        np.testing.assert_allclose(step(1.0, t) - step(0.0, t), a, rtol=1e-2)
        # The standard deviation of 1,000 draws is known to 2.2 %: 4.5 standard errors, false alarms below 1e-5.
        np.testing.assert_allclose(np.std(step(0.0, t)), np.sqrt(2 * a), rtol=0.1)


def test_a_diverging_sampler_says_where(trained):
    config = tiny()
    sampler = dict(name="annealed_langevin_corrector", num_steps=1)
    config.sampling.update(sampler=sampler, grid="ladder", step_size=1e20)
    with pytest.raises(UserError, match=r"not finite after step . of 2.*\(config.sampling\)"):
        experiment.run(config, "sample", trained)


MISTAKES = {
    "sde.name=VPP": "config.sde: unknown name 'VPP'; did you mean 'VP'",
    "sde.beta_min=30.0": "0 < beta_min <= beta_max",
    "sampling.sampler.name=huen": "did you mean 'heun'",
    "sampling.sampler.name=chain": "unknown name 'chain'",
    "sampling.grid=karas": "did you mean 'karras'",
    "sampling.num_steps=0": r"sampling\.num_steps must be a whole number, at least 1, got 0",
    "data.name=digit": "did you mean 'digits'",
    "data.name=cifar10": "not on disk.*python -m score_jax.data cifar10",
    "network.multipliers=(1,1,1,1,1)": "divisible by 16",
    "network.name=Unet": "did you mean 'UNet'",
    "parameterization.name=from_nois": "did you mean 'from_noise'",
    "conditioning=level": "at least 2 levels",
    "conditioning=tim": "did you mean 'time'",
    "training.weighting=variance": "did you mean 'variance_weighting'",
    "training.objective=denoising": "did you mean 'denoising_score_matching'",
    "training.times=draw_levels": "at least 2 levels",
    "training.times=uniform": "did you mean 'draw_uniform'",
    "training.decay=cosin": "'constant' or 'cosine'",
    "training.label_dropout=0.1": "takes no labels: set config.network.num_classes",
    "training.label_dropout=1.5": "at least 0 and less than 1, got 1.5",
    "sampling.guidance.name=classifier_free": "did you mean 'classifier_free_guidance'",
    "sampling.guidance.name=classifier_free_guidance": "needs a network of classes, trained with",
    "sampling.guidance.name=classifier_guidance": "workdir of a trained classifier, and there is no run in ''",
    "training.log_every=0": r"config\.training\.log_every must be a whole number, at least 1, got 0",
    "training.checkpoint_every=0": r"training\.checkpoint_every must be a whole number, at least 1, got 0",
    "training.batch_size=0": r"training\.batch_size must be a whole number, at least 1, got 0",
    "sampling.num_samples=0": r"sampling\.num_samples must be a whole number, at least 1, got 0",
    "sampling.batch_size=0": r"sampling\.batch_size must be a whole number, at least 1, got 0",
    "evaluation.num_samples=1": r"evaluation\.num_samples must be a whole number, at least 2, got 1",
    "seed=-1": "config.seed must be a whole number, at least 0 and less than 4294967296, got -1",
    "seed=1": "another config: seed is 0 there and 1 here",
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_mistakes_get_one_line(setting, trained, tmp_path):
    config = tiny()
    config.data.dir = str(tmp_path)
    field, value = setting.split("=")
    *path, last = field.split(".")
    node = config
    for part in path:
        node = node[part]
    old = node[last]
    node[last] = eval(value) if isinstance(old, tuple | int | float) else value
    with pytest.raises(UserError, match=MISTAKES[setting]) as caught:
        experiment.run(config, "train", trained)
    assert "\n" not in str(caught.value)


def test_a_parameter_of_another_class_is_named():
    config = tiny()
    config.sde.name = "VE"
    with pytest.raises(UserError, match="VE has no parameter 'beta_m"):
        experiment.make_sde(config)


def test_other_mistakes(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        experiment.run(tiny(), "sample", tmp_path / "new")
    with pytest.raises(UserError, match="did you mean 'train'"):
        experiment.run(tiny(), "trian", tmp_path / "new")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    with pytest.raises(UserError, match="not empty"):
        experiment.run(tiny(), "train", tmp_path / "mine")
    with pytest.raises(UserError, match=r"thesis.tex is a file: choose another --workdir"):
        experiment.run(tiny(), "train", tmp_path / "mine/thesis.tex")
    with pytest.raises(UserError, match=r"thesis.tex is a file: choose another --workdir"):
        experiment.run(tiny(), "train", tmp_path / "mine/thesis.tex/run")


def test_another_sampler_leaves_the_arguments_of_that_of_the_file():
    """Those that it does not have; what was given by hand stays, right or wrong."""
    config = get_config("ncsn_digits")
    sde = experiment.make_sde(config)

    def sampler(**fields):
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            changed.sampling.sampler.update(fields)
        changed = build.chosen(changed, [f"sampling.sampler.{name}" for name in fields])
        experiment.make_sampler(build.resolve(changed, None), sde, lambda x, t: -x)
        return changed.sampling.sampler.to_dict()

    assert sampler(name="sde_dpm_solver_pp") == {"name": "sde_dpm_solver_pp"}
    assert sampler(name="langevin_corrector") == {"name": "langevin_corrector", "num_steps": 5}
    for name in ("num_steps", "num_step"):
        with pytest.raises(UserError, match=f"sde_dpm_solver_pp has no parameter '{name}'"):
            sampler(name="sde_dpm_solver_pp", **{name: 3})
