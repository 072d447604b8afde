"""Distillation against the flow of Gaussian data, in closed form, on every process, and from a config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_experiment import tiny, untrained

import score_jax as sj
from score_jax import context, experiment, objective, timesteps
from score_jax.errors import UserError

# Data N(MEAN, VARIANCE I) in 3 dimensions.
MEAN, VARIANCE, D = jnp.array([[1.0, -0.5, 2.0]]), 0.49, 3


def level(sde, t):
    return sde.sigma(t) / sde.alpha(t)


def spread(sde, t):
    """The standard deviation of y = x / alpha."""
    return jnp.sqrt(VARIANCE + level(sde, t) ** 2)


def score_fn(sde):
    return sj.GaussianMixture([1.0], MEAN, VARIANCE * jnp.eye(D)[None]).score_fn(sde)


def student(sde, slope):
    """A score whose eps at (x, t) is `slope(t) (y - mean)`."""

    def fn(x, t):
        y = x / sj.expand(sde.alpha(t), x)
        return -sj.expand(slope(t) / sde.sigma(t), x) * (y - MEAN)

    return fn


def off(sde, fn, offset):
    """A score whose eps is larger by a number than that of another."""
    return lambda x, t: fn(x, t) - sj.expand(offset / sde.sigma(t), x)


def to_the_end(sde, end):
    """The student of consistency: the flow keeps (y - mean) / spread, so a jump to `end` scales y - mean.

    By  (spread_end - spread_t) / (l_end - l_t) = (l_end + l_t) / (spread_end + spread_t),  which does not round.
    """

    def slope(t):
        return (level(sde, end) + level(sde, t)) / (spread(sde, end) + spread(sde, t)) / spread(sde, t)

    return student(sde, slope)


def two_steps(sde, ts):
    """The student that takes one step for DDIM's two, each of which scales y - mean as well."""

    def scale(t, s):
        return 1 + (level(sde, s) - level(sde, t)) * level(sde, t) / spread(sde, t) ** 2

    def slope(t):
        i = jnp.argmin(jnp.abs(ts[:, None] - jnp.atleast_1d(t)[None]), axis=0)
        middle, s = ts[i + 1], ts[i + 2]
        return (scale(t, middle) * scale(middle, s) - 1) / (level(sde, s) - level(sde, t))

    return student(sde, slope)


def test_a_student_of_two_steps_has_no_loss_and_one_that_is_off_a_known_one(any_sde):
    """A student whose eps is off by 0.1 in each of 3 dimensions has the loss  w / (2 sigma^2) 3 0.1^2,  row by row."""
    sde, ts = any_sde, timesteps.log_snr(any_sde, 8)
    x = MEAN + 0.7 * jax.random.normal(jax.random.key(0), (256, D))
    teacher, exact = score_fn(sde), two_steps(sde, ts)

    @jax.jit
    def losses(offset):
        one = off(sde, exact, offset)
        return sj.progressive_distillation(jax.random.key(1), sde, one, teacher, x, ts, weight=sj.variance_weighting)

    assert float(losses(0.0).max()) < 1e-6
    np.testing.assert_allclose(losses(0.1), np.full(256, 0.5 * D * 0.01), rtol=0.02)


def test_consistency_has_no_loss_on_the_flow_and_differentiates_the_first_jump(any_sde):
    """Three times: a step leaves the part r = (l_t - l_s) / (l_t - l_end) of what eps is off, and all of the gradient.

    Of the two steps the first has some r < 1 and the second r = 1, so the losses are  3/2 0.1^2 r^2,  their
    derivatives by the offset  3 0.1 r.
    """
    sde, ts = any_sde, timesteps.log_snr(any_sde, 120)[60:63]
    x = MEAN + 0.7 * jax.random.normal(jax.random.key(0), (64, D))
    teacher, exact = score_fn(sde), to_the_end(sde, ts[-1])

    def losses(offset):
        one = off(sde, exact, offset)
        return sj.consistency_distillation(jax.random.key(1), sde, one, teacher, x, ts, weight=sj.variance_weighting)

    both = jax.jit(lambda offset: jax.jvp(losses, (offset,), (1.0,)))
    assert float(both(0.0)[0].max()) < 1e-5
    values, slopes = both(0.1)
    levels = np.asarray(level(sde, ts))
    rs = np.array([(levels[0] - levels[1]) / (levels[0] - levels[2]), 1.0])
    r = rs[np.argmin(np.abs(np.asarray(values)[:, None] - 1.5 * 0.01 * rs[None] ** 2), axis=1)]
    assert set(r) == set(rs)
    np.testing.assert_allclose(values, 1.5 * 0.01 * r**2, rtol=0.15)
    np.testing.assert_allclose(slopes, 3 * 0.1 * r, rtol=0.1)


@jax.jit
def training_slope(sde, factor, key):
    """The derivative of each of 20,000 losses of consistency training by a factor on the eps of the exact student."""
    ts = timesteps.log_snr(sde, 200)
    key_data, key = jax.random.split(key)
    x = MEAN + jnp.sqrt(VARIANCE) * jax.random.normal(key_data, (20_000, D))
    exact = to_the_end(sde, ts[-1])

    def losses(factor):
        return sj.consistency_training(key, sde, lambda x, t: factor * exact(x, t), x, ts)

    return jax.jvp(losses, (factor,), (1.0,))[1]


def test_consistency_training_has_the_flow_for_its_mean(any_sde):
    """No slope at the exact student, one that is not chance at one that is off by a tenth: 4.5 standard errors."""
    for factor, least, most in ((1.0, 0.0, 4.5), (1.1, 4.5, np.inf), (0.9, 4.5, np.inf)):
        slopes = np.asarray(training_slope(any_sde, factor, jax.random.key(0)))
        score = slopes.mean() / (slopes.std() / np.sqrt(len(slopes)))
        assert least <= abs(score) <= most
        assert factor == 1.0 or np.sign(score) == np.sign(factor - 1)


@pytest.mark.parametrize("steps", [1, 3])
def test_samples_of_a_consistency_model_have_the_law(any_sde, steps):
    """4,000 samples in 3 dimensions from the exact marginal at t_max; moments within 4.5 standard errors."""
    sde, n = any_sde, 4000

    @jax.jit
    def draw(key):
        key_start, key = jax.random.split(key)
        z = jax.random.normal(key_start, (n, D))
        x = sde.alpha(sde.t_max) * (MEAN + spread(sde, sde.t_max) * z)
        sampler = sj.consistency(sde, to_the_end(sde, sde.t_min))
        return sj.sample(key, sampler, x, timesteps.log_snr(sde, steps)) / sde.alpha(sde.t_min)

    y = np.asarray(draw(jax.random.key(0)))
    width = float(spread(sde, sde.t_min))
    np.testing.assert_allclose(y.mean(0), MEAN[0], atol=4.5 * width / np.sqrt(n))
    np.testing.assert_allclose(np.cov(y.T), width**2 * np.eye(D), atol=4.5 * width**2 * np.sqrt(2 / n))


def test_the_grid_can_be_a_list_of_times():
    sde, ts = sj.VP(), [1.0, 0.5, 0.1]
    args = jax.random.key(0), sde, score_fn(sde)
    for loss in (
        lambda ts: sj.progressive_distillation(*args, score_fn(sde), MEAN, ts),
        lambda ts: sj.consistency_training(*args, MEAN, ts),
    ):
        np.testing.assert_array_equal(loss(ts), loss(jnp.array(ts)))


def test_an_odd_grid_is_an_error():
    with pytest.raises(ValueError, match="an even number of steps, got 3"):
        sj.progressive_distillation(
            jax.random.key(0), sj.VP(), score_fn(sj.VP()), score_fn(sj.VP()), MEAN, timesteps.uniform(sj.VP(), 3)
        )


@pytest.mark.parametrize("t_min", [1e-3, 2e-3, 3e-3, 5e-3])
def test_jumps_end_without_noise_wherever_that_is(t_min):
    """Compiled, the time that a jump ends at and the last of the grid differ by rounding."""
    sde = sj.OrnsteinUhlenbeck(t_min=t_min)
    sampler, x = sj.consistency(sde, lambda x, t: -x), jnp.ones((2, 3))
    ends = jax.jit(lambda ts: sj.sample(jax.random.key(0), sampler, x, ts))(jnp.array([sde.t_max, t_min]))
    expected, _ = sj.ddim(sde, lambda x, t: -x).step(None, x, sde.t_max, t_min, ())
    np.testing.assert_allclose(ends, expected, atol=1e-3)


PROGRESSIVE = "progressive_distillation"


def distilled(teacher, objective="consistency_distillation"):
    config = tiny("consistency_digits")
    config.training.update(objective=objective, num_steps=2, learning_rate=0.0)
    config.training.distillation.update(teacher=str(teacher), num_steps=4)
    config.sampling.update(grid="karras", num_steps=2)
    if objective == PROGRESSIVE:
        config.sampling.sampler.name = "ddim"
    return config


class Linear:
    """A network that is its parameter times x, and notes which parameters were used in training, with which labels."""

    def __init__(self):
        self.trained, self.labels = {}, []

    def apply(self, params, x, cond, y, *, train=False, rngs=None):
        self.trained[float(params)] = train
        self.labels.append(y)
        return params * x


def test_the_teacher_has_parameters_of_its_own_and_is_not_in_training():
    network, config = Linear(), distilled("somewhere")
    config.network.num_classes = 3
    loss_fn = objective.make_loss(config, sj.EDM(), network)
    batch = {"x": jnp.full((4, 2, 2, 1), 0.5), "y": jnp.arange(4) % 3}
    one, other = (loss_fn(0.4, jax.random.key(0), batch, teacher) for teacher in (0.8, 1.6))
    assert abs(one - other) > 0.01 * one
    assert network.trained == {0.4: True, 0.8: False, 1.6: False}
    assert all((y == batch["y"]).all() for y in network.labels)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return untrained(tiny("edm_digits"), tmp_path_factory.mktemp("teacher") / "edm_digits")


def test_distillation_begins_with_the_teacher_and_goes_on_without(tmp_path, teacher):
    """At a learning rate of 0 the student remains its teacher; a run that was begun, and its end, need no teacher."""
    config, student = distilled(teacher), tmp_path / "student"
    experiment.run(config, "train", student)
    (_, before), (_, after) = (
        experiment.Run(c, w).restore() for c, w in ((tiny("edm_digits"), teacher), (config, student))
    )
    jax.tree.map(np.testing.assert_array_equal, before.ema, after.params)
    samples = np.load(student / "samples/step_2.npz")["arr_0"]
    assert samples.shape == (5, 8, 8, 1)
    config.training.distillation.teacher = "moved"
    experiment.run(config, "train", student)  # Finished: it samples.
    np.testing.assert_array_equal(np.load(student / "samples/step_2.npz")["arr_0"], samples)


def test_the_network_that_training_begins_with(tmp_path, teacher, monkeypatch):
    """That of `--pretrained`, which is the teacher, too, where there is no other."""
    config = distilled(teacher)
    ones = jax.tree.map(jnp.ones_like, experiment.Run(tiny("edm_digits"), teacher).restore()[1].ema)
    monkeypatch.setattr(context, "adopt", lambda config, path: config)
    monkeypatch.setattr(context, "load_params", lambda *_: ones)
    run = experiment.Run(config, tmp_path / "both", pretrained="file")
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(run.first_state().params))
    assert not all((leaf == 1).all() for leaf in jax.tree.leaves(run.teacher))
    config.training.distillation.teacher = ""
    run = experiment.Run(config, tmp_path / "one", pretrained="file")
    assert all((leaf == 1).all() for leaf in jax.tree.leaves((run.teacher, run.first_state().ema)))


def test_dropout_precision_and_what_is_off_are_the_students_own(tmp_path, teacher):
    config = distilled(teacher, PROGRESSIVE)
    config.network.update(dropout=0.1, dtype="bfloat16", remat=True)
    with config.unlocked():
        config.sampling.sampler.eta = 0.0
        config.sampling.corrector.snr = 0.16
    assert experiment.Run(config, tmp_path / "student").teacher


def test_students_of_two_steps_are_teachers_of_one(tmp_path, teacher):
    two, one = (distilled(teacher, PROGRESSIVE) for _ in range(2))
    untrained(two, tmp_path / "two")
    one.training.distillation.update(teacher=str(tmp_path / "two"), num_steps=2)
    one.sampling.num_steps = 1
    assert experiment.Run(one, tmp_path / "one").teacher
    for wrong in (distilled(tmp_path / "two"), distilled(tmp_path / "two", PROGRESSIVE)):
        with pytest.raises(UserError, match="it is a student of progressive_distillation on 'karras' of 4 steps; only"):
            experiment.Run(wrong, tmp_path / "wrong")


MISTAKES = {
    "no teacher": ("", {"training.distillation.teacher": ""}, "workdir of the network to distil, and there is no run"),
    "process": ("", {"sde.t_max": 70.0}, r"another config\.sde: .*80.* there and .*70"),
    "network": ("", {"network.features": 8}, "config.network.features is 4 there and 8 here"),
    "no class": ("", {"network.num_classes": 10}, "config.network.num_classes is 0 there and 10 here"),
    "grid": ("", {"training.distillation.grid": "karas"}, "unknown name 'karas'; did you mean 'karras'"),
    "ladder": (
        PROGRESSIVE,
        {"training.distillation.grid": "ladder", "sampling.grid": "ladder"},
        "every second time of 'ladder' is not",
    ),
    "levels": ("", {"num_levels": 3}, "another config.num_levels: 0 there and 3 here"),
    "eta": (PROGRESSIVE, {"sampling.sampler.eta": 0.5}, r"sampling\.sampler: .* must be {'name': 'ddim'}, got"),
    "odd": (PROGRESSIVE, {"training.distillation.num_steps": 5}, "an even number of steps, got 5"),
    "times": ("", {"training.times": "draw_unifrom"}, "unknown name 'draw_unifrom'"),
    "sampler": ("", {"sampling.sampler.name": "heun"}, r"sampling\.sampler: .* must be {'name': 'consistency'}, got"),
    "corrector": (
        "",
        {"sampling.corrector.name": "langevin_corrector"},
        r"sampling\.corrector: .* must be {'name': ''}",
    ),
    "t_min": ("", {"sampling.t_min": 0.01}, r"sampling\.t_min: .* must be 0\.002, got 0\.01"),
    "denoise": ("", {"sampling.denoise": True}, r"sampling\.denoise: .* must be False"),
    "steps": (PROGRESSIVE, {"sampling.num_steps": 4}, r"sampling\.num_steps: .* must be 2, got 4"),
    "dropout": ("", {"network.dropout": 1.0}, r"config\.network\.dropout must be at least 0 and less than 1, got 1\.0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_distillation_get_one_line(tmp_path, teacher, name):
    """Before there is a workdir, which would be one of the mistake."""
    objective, fields, message = MISTAKES[name]
    config = distilled(teacher, *filter(None, [objective]))
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        experiment.run(config, "train", tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_teacher_without_no_class_has_no_student_with_it():
    config, teacher = tiny("vp_digits_conditional"), tiny("vp_digits_conditional")
    objective.check_teacher(config, teacher)
    teacher.training.label_dropout = 0.0
    with pytest.raises(UserError, match="knows no 'no class'"):
        objective.check_teacher(config, teacher)


def test_modes_that_need_a_score_are_refused(tmp_path, teacher):
    with pytest.raises(UserError, match="--mode=likelihood needs a score, and consistency_distillation makes"):
        experiment.run(distilled(teacher), "likelihood", tmp_path / "student")
