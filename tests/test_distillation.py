"""Distillation against the flow of Gaussian data, in closed form, on every process, and from a config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_experiment import tiny, untrained

import score_jax as sj
from score_jax import experiment, objective, timesteps
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
    """The student of consistency: the flow keeps (y - mean) / spread, so a jump to `end` scales y - mean."""

    def slope(t):
        length, change = level(sde, end) - level(sde, t), spread(sde, end) / spread(sde, t) - 1
        return jnp.where(length == 0, 0.0, change / jnp.where(length == 0, 1.0, length))

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

    assert float(losses(0.0).max()) < 1e-5
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

    values, slopes = jax.jit(lambda offset: jax.jvp(losses, (offset,), (1.0,)))(0.1)
    assert float(jax.jit(losses)(0.0).max()) < 2e-4
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


def test_an_odd_grid_is_an_error():
    with pytest.raises(ValueError, match="an even number of steps, got 3"):
        sj.progressive_distillation(
            jax.random.key(0), sj.VP(), score_fn(sj.VP()), score_fn(sj.VP()), MEAN, timesteps.uniform(sj.VP(), 3)
        )


def distilled(teacher, objective="consistency_distillation"):
    config = tiny("consistency_digits")
    config.training.update(objective=objective, num_steps=2, learning_rate=0.0)
    config.training.distillation.update(teacher=str(teacher), num_steps=4)
    config.sampling.num_steps = 1
    return config


class Linear:
    """A network that is its parameter times x, and notes which parameters were used in training."""

    def __init__(self):
        self.trained = {}

    def apply(self, params, x, cond, y, *, train=False, rngs=None):
        self.trained[float(params)] = train
        return params * x


def test_the_teacher_has_parameters_of_its_own_and_is_not_in_training():
    network = Linear()
    loss_fn = objective.make_loss(distilled("somewhere"), sj.EDM(), network)
    batch = {"x": jnp.full((4, 2, 2, 1), 0.5), "y": jnp.zeros(4, jnp.int32)}
    one, other = (loss_fn(0.4, jax.random.key(0), batch, teacher) for teacher in (0.8, 1.6))
    assert abs(one - other) > 0.01 * one
    assert network.trained == {0.4: True, 0.8: False, 1.6: False}


def test_distillation_begins_with_the_teacher_and_leaves_it_alone(tmp_path):
    """At a learning rate of 0 the student remains its teacher, and is one itself."""
    teacher = untrained(tiny("edm_digits"), tmp_path / "teacher")
    config = distilled(teacher)
    experiment.run(config, "train", tmp_path / "student")
    (_, before), (_, after) = (
        experiment.Run(c, w).restore() for c, w in ((tiny("edm_digits"), teacher), (config, tmp_path / "student"))
    )
    jax.tree.map(np.testing.assert_array_equal, before.ema, after.params)
    assert np.load(tmp_path / "student/samples/step_2.npz")["arr_0"].shape == (5, 8, 8, 1)
    again = distilled(tmp_path / "student", "progressive_distillation")
    assert jax.tree.leaves(experiment.Run(again, tmp_path / "next").teacher)
    (tmp_path / "teacher/config.yaml").unlink()
    experiment.run(config, "sample", tmp_path / "student")  # Without the teacher.


def test_mistakes_of_distillation_get_one_line(tmp_path):
    teacher = untrained(tiny("vp_digits"), tmp_path / "teacher")
    other, odd, grid = distilled(teacher), distilled(teacher, "progressive_distillation"), distilled(teacher)
    odd.training.distillation.num_steps = 3
    grid.training.distillation.grid = "karas"
    for config, message in (
        (distilled(""), r"training\.distillation\.teacher must be the workdir of the one to distil, got ''"),
        (other, r"another config\.sde: .*'VP'.* there and .*'EDM'"),
        (odd, "an even number of steps, got 3"),
        (grid, "unknown name 'karas'; did you mean 'karras'"),
    ):
        with pytest.raises(UserError, match=message):
            experiment.run(config, "train", tmp_path / "student")
        with pytest.raises(UserError, match="--mode=likelihood needs a score, and"):
            experiment.run(config, "likelihood", tmp_path / "student")
        assert not (tmp_path / "student").exists()
