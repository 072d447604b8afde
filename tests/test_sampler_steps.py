"""Single steps of samplers: their derivatives, steps of no length, and the options that a whole run does not show."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_cases import PREDICTORS
from test_samplers import CORRECTED, SAMPLERS

import score_jax as sj
from score_jax import samplers, timesteps

N = 20_000
DIFFERENTIABLE = {n: getattr(samplers, n) for n in sorted(PREDICTORS - {"adaptive_sde", "picard"})}
DIFFERENTIABLE |= {"ddim, eta 1": lambda *a: sj.ddim(*a, eta=1.0), "deis, corrected": CORRECTED["deis"]}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives(name):
    """Of a run, by the data's variance and by beta_max: backwards as forwards.

    The score is that of N(0, v); one of the times is there twice, where the root of the noise has no derivative.
    """
    ts, x = jnp.array([1.0, 0.7, 0.4, 0.4, 0.2, 0.01]), jax.random.normal(jax.random.key(0), (3, 2))

    def run(parameters):
        sde = sj.VP(beta_max=parameters[1])

        def score_fn(x, t):
            return -x / (parameters[0] * sde.alpha(t) ** 2 + sde.sigma(t) ** 2)

        return jnp.mean(sj.sample(jax.random.key(1), DIFFERENTIABLE[name](sde, score_fn), x, ts) ** 2)

    at = jnp.array([0.5, 5.0])
    backwards, forwards = jax.jit(lambda at: (jax.grad(run)(at), jax.jacfwd(run)(at)))(at)
    np.testing.assert_allclose(backwards, forwards, rtol=1e-3)
    assert np.all(np.isfinite(backwards))


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in ("stochastic_heun", "ancestral, annealed Langevin")])
def test_steps_of_no_length_change_nothing(mixture, name):
    """At the first time, in between and at the last: nor do they change what a multistep method remembers.

    Stochastic Heun and a corrector draw noise there, as they should.
    """
    sde = sj.VP(t_min=1e-2)
    sampler, once = SAMPLERS[name][0](sde, mixture.score_fn(sde)), [1.0, 0.7, 0.4, 0.2, 0.01]
    step, start = jax.jit(sampler.step), mixture.sample(jax.random.key(0), 8)

    def run(ts):
        x, state = start, jax.jit(sampler.init)(start, jnp.array(ts[0]))
        for t, s in itertools.pairwise(ts):
            x, state = step(jax.random.key(1), x, jnp.array(t), jnp.array(s), state)
        return x

    np.testing.assert_allclose(run(sorted([*once, *once[::2]], reverse=True)), run(once), rtol=1e-4, atol=1e-5)


def test_particles_do_not_move_in_a_step_of_no_length(mixture):
    sde, x = sj.VP(t_min=1e-2), jax.random.normal(jax.random.key(0), (8, 2))

    def run(ts):
        options = dict(noise_std=0.5, threshold=0.0)
        return sj.twisted_smc(
            jax.random.key(1), sde, mixture.score_fn(sde), jnp.ones(1), lambda x: x[:, :1], x, ts, **options
        )

    ts = timesteps.log_snr(sde, 10)
    for twice, once in zip(run(jnp.append(ts, ts[-1])), run(ts), strict=True):
        np.testing.assert_allclose(twice, once, rtol=1e-5)


def test_times_can_be_a_list_and_wrong_ones_are_named(mixture):
    sde, x = sj.VP(), jnp.ones((2, 2))
    sampler = sj.unipc(sde, mixture.score_fn(sde))
    args = jax.random.key(0), sampler, x
    ts = [1.0, 0.5, 0.1]
    np.testing.assert_array_equal(sj.sample(*args, ts), sj.sample(*args, jnp.array(ts)))
    with pytest.raises(FloatingPointError, match="after step 2 of 2: the times should be above 0"):
        sj.sample(*args, [1.0, 0.5, 0.0])
    for times in (ts[::-1], [0.5, 0.9, 0.1]):
        with pytest.raises(ValueError, match="ts must not increase: a sampler goes from noise to data"):
            sj.sample(jax.random.key(0), sj.heun(sde, mixture.score_fn(sde)), x, times)
    wild = sj.ddim(sde, lambda x, t: x * jnp.inf)
    with pytest.raises(FloatingPointError, match="after step 1 of 2: take more steps or another sampler"):
        sj.sample(jax.random.key(0), wild, x, ts)


CHURNED = {
    "everywhere": ({}, True),
    "inside": ({"noise_min": 0.9, "noise_max": 1.1}, True),
    "above the smallest": ({"noise_min": 1.1}, False),
    "below the largest": ({"noise_max": 0.9}, False),
}


@pytest.mark.parametrize("name", CHURNED)
def test_churn_adds_its_noise_within_its_band(sde, name):
    """Without a score x / alpha stays where it is but for the noise: of variance 1.1^2 l^2 ((1 + churn)^2 - 1).

    At l = 1, and the band in units of it.  40,000 numbers, 4.5 standard errors: false alarms below 1e-5 each.
    """
    bounds, active = CHURNED[name]
    t, s = timesteps.time_of_log_snr(sde, 0.0), timesteps.time_of_log_snr(sde, 1.0)
    sampler = sj.stochastic_heun(sde, lambda x, t: 0 * x, churn=0.3, noise_scale=1.1, **bounds)
    x = sampler.step(jax.random.key(0), sde.alpha(t) * jnp.ones((N, 2)), t, s, ())[0] / sde.alpha(s)
    expected = 1.1**2 * (1.3**2 - 1) if active else 0.0
    assert abs(float(x.mean()) - 1) <= 4.5 * np.sqrt(expected / x.size) + 1e-5
    assert abs(float(x.var()) - expected) <= 4.5 * expected * np.sqrt(2 / x.size) + 1e-6


def test_part_of_the_noise_of_the_reverse_sde():
    """DPM-Solver++ with eta: with h the step in log(alpha/sigma) and a posterior mean of 2,

    x_s ~ N(alpha_s 2 + exp(-(1 + eta^2) h) (alpha_s/alpha_t) (x_t - alpha_t 2), sigma_s^2 (1 - exp(-2 eta^2 h))).
    40,000 numbers, 4.5 standard errors: false alarms below 1e-5 each.
    """
    sde, eta, t, s = sj.VP(), 0.5, jnp.array(0.6), jnp.array(0.4)
    score_fn = sj.from_denoiser(sde, lambda x, t: 2 + 0 * x)
    x = sj.sample(jax.random.key(0), sj.dpm_solver_pp(sde, score_fn, eta=eta), jnp.ones((N, 2)), [t, s])
    h = 0.5 * (sde.log_snr(s) - sde.log_snr(t))
    mean = 2 * sde.alpha(s) + jnp.exp(-(1 + eta**2) * h) * sde.alpha(s) / sde.alpha(t) * (1 - 2 * sde.alpha(t))
    variance = sde.sigma(s) ** 2 * (1 - jnp.exp(-2 * eta**2 * h))
    assert abs(float(x.mean() - mean)) < 4.5 * np.sqrt(variance / x.size)
    assert abs(float(x.var() / variance) - 1) < 4.5 * np.sqrt(2 / x.size)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("solver_type", ["heun", "midpoint"])
def test_both_types_of_the_second_order(mixture, solver_type, eta):
    """A step by hand, in the form of diffusers' and k-diffusion's.

    With h and r h the steps in log(alpha/sigma), this one and the last, and e = 1 - exp(-(1 + eta^2) h), the part that
    the difference (D_0 - D_1) / r gets is e/2 (midpoint; Lu et al. 2022, Algorithm 2) or 1 - e / ((1 + eta^2) h).
    """
    sde, key, ts = sj.VP(), jax.random.key(1), jnp.array([0.6, 0.5, 0.35])
    score_fn, x = mixture.score_fn(sde), mixture.sample(jax.random.key(0), 8)
    sampler = sj.dpm_solver_pp(sde, score_fn, eta=eta, solver_type=solver_type)
    first, state = sampler.step(key, x, ts[0], ts[1], sampler.init(x, ts[0]))
    found, _ = sampler.step(key, first, ts[1], ts[2], state)
    old, new = sj.tweedie(sde, score_fn, x, ts[0]), sj.tweedie(sde, score_fn, first, ts[1])
    half = 0.5 * sde.log_snr(ts)
    h, rate = half[2] - half[1], 1 + eta**2
    r, e = (half[1] - half[0]) / h, 1 - jnp.exp(-rate * h)
    share = e / 2 if solver_type == "midpoint" else 1 - e / (rate * h)
    expected = sde.sigma(ts[2]) / sde.sigma(ts[1]) * jnp.exp(-(eta**2) * h) * first
    expected += sde.alpha(ts[2]) * (e * new + share * (new - old) / r)
    noise = sde.sigma(ts[2]) * jnp.sqrt(1 - jnp.exp(-2 * eta**2 * h)) * jax.random.normal(key, x.shape)
    np.testing.assert_allclose(found, expected + noise, rtol=1e-4, atol=1e-4)


def test_adaptive_steps_are_each_example_s_own(mixture):
    """Whoever is next to it, an example ends where it did, and its steps have their own length."""
    sde = sj.VP(t_min=1e-2)
    sampler = sj.adaptive_sde(sde, mixture.score_fn(sde), rtol=0.1, atol=0.05)
    x, t, s = mixture.sample(jax.random.key(0), 4), jnp.array(0.5), jnp.array(0.3)
    step = jax.jit(lambda x: sampler.step(jax.random.key(1), x, t, s, sampler.init(x, t)))
    (first, lengths), (second, others) = step(x), step(x.at[1:].mul(30.0))
    np.testing.assert_allclose(first[0], second[0], rtol=1e-5)
    np.testing.assert_allclose(lengths[0], others[0], rtol=1e-5)
    assert not np.any(np.isclose(lengths[1:], others[1:], rtol=0.01))


def test_picard_ends_after_its_iterations_or_when_nothing_moves(mixture):
    """Two iterations of two points are DDIM; one is the integral along x_t's ray; and 16 points take fewer than 16."""
    sde, t, s = sj.VP(t_min=1e-2), jnp.array(0.6), jnp.array(0.3)
    score_fn, x, calls = mixture.score_fn(sde), mixture.sample(jax.random.key(0), 8), []
    inner = timesteps.time_of_log_snr(sde, jnp.linspace(sde.log_snr(t), sde.log_snr(s), 3)).at[0].set(t).at[-1].set(s)

    def counted(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return score_fn(x, t)

    def run(**options):
        calls.clear()
        end = jax.jit(sj.picard(sde, counted, **options).step)(jax.random.key(1), x, t, s, ())[0]
        jax.effects_barrier()
        return end

    two = run(num_points=2, tolerance=0.0)
    np.testing.assert_allclose(two, sj.sample(jax.random.key(0), sj.ddim(sde, score_fn), x, inner), rtol=1e-4)
    alpha, sigma = sde.alpha(inner), sde.sigma(inner)
    ray = [-sigma[i] * score_fn(alpha[i] / alpha[0] * x, inner[i]) for i in (0, 1)]
    level = sigma / alpha
    one = alpha[2] * (x / alpha[0] + (level[1] - level[0]) * ray[0] + (level[2] - level[1]) * ray[1])
    for options in ({"max_iterations": 1, "tolerance": 0.0}, {"tolerance": 1e9}):
        np.testing.assert_allclose(run(num_points=2, **options), one, rtol=1e-4)
    assert float(jnp.abs(one - two).max()) > 0.01
    exact = run(num_points=16, tolerance=0.0)
    most = len(calls)
    np.testing.assert_allclose(run(num_points=16), exact, atol=3e-3)
    assert len(calls) < most
