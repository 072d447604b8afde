"""Every sampler on the exact score of a mixture: its law, its order, and the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mode_share, moments

import score_jax as sj
from score_jax import timesteps

N = 10_000


# Steps enough for a discretisation error well below the statistical one.
SAMPLERS = {
    "euler_maruyama": (sj.euler_maruyama, timesteps.log_snr, 200),
    "ancestral": (sj.ancestral, timesteps.log_snr, 200),
    "ddim": (sj.ddim, timesteps.log_snr, 200),
    "ddim_eta_half": (lambda sde, s: sj.ddim(sde, s, eta=0.5), timesteps.log_snr, 200),
    "euler": (sj.euler, timesteps.log_snr, 200),
    "heun": (sj.heun, timesteps.karras, 50),
    "dpm_solver_pp": (sj.dpm_solver_pp, timesteps.log_snr, 50),
    "dpm_solver_pp_of_the_sde": (lambda sde, s: sj.dpm_solver_pp(sde, s, eta=1.0), timesteps.log_snr, 100),
    "unipc": (sj.unipc, timesteps.log_snr, 40),
    "deis": (sj.deis, timesteps.log_snr, 50),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_law(sde, mixture, name):
    """Mean, covariance and mode weight of 10,000 samples from the exact marginal at t_max.

    Bounds: 4.5 standard errors (false alarms below 1e-4 over all cases) plus a discretisation error.
    """
    make, grid, n = SAMPLERS[name]

    @jax.jit
    def draw(key):
        key_start, key = jax.random.split(key)
        x = mixture.marginal(sde, sde.t_max).sample(key_start, N)
        x = sj.sample(key, make(sde, mixture.score_fn(sde)), x, grid(sde, n))
        return sj.tweedie(sde, mixture.score_fn(sde), x, sde.t_min)

    x = draw(jax.random.key(0))
    mean, cov = moments(mixture)
    se = float(jnp.sqrt(cov.max() / N))
    np.testing.assert_allclose(x.mean(0), mean, atol=4.5 * se + 0.02)
    np.testing.assert_allclose(jnp.cov(x.T), cov, atol=4.5 * float(cov.max()) * np.sqrt(2 / N) + 0.05)
    assert abs(float(mode_share(mixture, x).mean()) - 0.7) < 4.5 * np.sqrt(0.21 / N) + 0.005
    # Within each mode, too: the covariance of the whole is mostly the distance of the modes.
    near = x[np.asarray(mode_share(mixture, x)) > 0.5]
    np.testing.assert_allclose(jnp.cov(near.T), mixture.covariances[0], atol=0.04)


def whole(make, **options):
    """A multistep sampler without its last step of order one, which is not the method's."""
    return lambda sde, score_fn: make(sde, score_fn, lower_order_final=False, **options)


ORDERS = {
    "euler": (sj.euler, 1, (40, 160)),
    "ddim": (sj.ddim, 1, (40, 160)),
    "heun": (sj.heun, 2, (40, 160)),
    "dpm_solver_pp 1": (whole(sj.dpm_solver_pp, order=1), 1, (40, 160)),
    "dpm_solver_pp 2": (whole(sj.dpm_solver_pp, order=2), 2, (40, 160)),
    "dpm_solver_pp 3": (whole(sj.dpm_solver_pp, order=3), 3, (40, 160)),
    "unipc 1": (whole(sj.unipc, order=1), 2, (40, 160)),
    "unipc 2": (whole(sj.unipc, order=2), 3, (40, 160)),
    "deis 2": (whole(sj.deis, order=2), 2, (40, 160)),
    "deis 2, corrected": (whole(sj.deis, order=2, corrector=True), 3, (40, 160)),
    "deis 3": (whole(sj.deis, order=3), 3, (80, 160)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_deterministic_samplers_converge_with_their_order(sde, mixture, name):
    """The error against an adaptive solution, itself within 1e-5, falls as n^-order."""
    make, order, steps = ORDERS[name]
    sde = type(sde)(t_min=1e-2)
    x = mixture.marginal(sde, sde.t_max).sample(jax.random.key(0), 256)
    score_fn = mixture.score_fn(sde)

    def solve(make, n):
        return jax.jit(lambda x: sj.sample(jax.random.key(1), make(sde, score_fn), x, timesteps.log_snr(sde, n)))(x)

    exact = sj.ode_sample(sde, score_fn, x, rtol=1e-6, atol=1e-6, solver="dopri8")
    errors = [float(jnp.median(jnp.linalg.norm(solve(make, n) - exact, axis=1))) for n in steps]
    measured = np.log(errors[0] / errors[1]) / np.log(steps[1] / steps[0])
    assert order - 0.25 < measured < order + 0.5, (errors, measured)


@pytest.mark.parametrize("name", ["euler_maruyama", "ancestral"])
def test_stochastic_samplers_converge_weakly_with_order_one(name):
    """The variance of N(0, 1/4) data under VP: 400,000 draws have a standard error of 0.0006.

    The errors, 0.006 and more, halve as the steps double.
    """
    sde = sj.VP(t_min=0.05)
    data = sj.GaussianMixture(jnp.ones(1), jnp.zeros((1, 1)), jnp.full((1, 1, 1), 0.25))
    x = data.marginal(sde, sde.t_max).sample(jax.random.key(0), 400_000)
    exact = float(data.marginal(sde, sde.t_min).covariances[0, 0, 0])
    errors = []
    for n in (32, 64, 128):
        run = jax.jit(
            lambda x, n=n: sj.sample(
                jax.random.key(1), getattr(sj, name)(sde, data.score_fn(sde)), x, timesteps.uniform(sde, n)
            )
        )
        errors.append(abs(float(run(x).var()) - exact))
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert errors[-1] > 0.004, errors
    assert np.all(np.abs(orders - 1.05) < 0.35), (errors, orders)


def test_ddim_with_full_noise_is_ancestral(sde, mixture):
    x, score_fn = mixture.sample(jax.random.key(0), 10), mixture.score_fn(sde)
    args = jax.random.key(1), x, jnp.array(0.6), jnp.array(0.5), ()
    first, second = (make.step(*args)[0] for make in (sj.ancestral(sde, score_fn), sj.ddim(sde, score_fn, eta=1.0)))
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-4)


def test_multistep_of_order_one_is_ddim(sde, mixture):
    """Data or noise predicted, in any coordinate; with the SDE's noise it is ancestral sampling."""
    x, score_fn, ts = mixture.sample(jax.random.key(0), 10), mixture.score_fn(sde), jnp.array([0.6, 0.5])

    def run(sampler):
        return sj.sample(jax.random.key(1), sampler, x, ts)

    for make in (sj.dpm_solver_pp, sj.deis):
        np.testing.assert_allclose(run(make(sde, score_fn, order=1)), run(sj.ddim(sde, score_fn)), rtol=1e-4, atol=1e-4)
    noisy = run(sj.dpm_solver_pp(sde, score_fn, order=1, eta=1.0))
    np.testing.assert_allclose(noisy, run(sj.ancestral(sde, score_fn)), rtol=1e-4, atol=1e-4)


def test_corrector_treats_each_example_by_itself(mixture):
    sde = sj.VP()
    corrector = sj.langevin_corrector(sde, mixture.score_fn(sde))
    x = mixture.sample(jax.random.key(0), 8)
    args = jnp.array(0.6), jnp.array(0.5), ()
    together = corrector.step(jax.random.key(1), x, *args)[0]
    changed = corrector.step(jax.random.key(1), x.at[1:].mul(10.0), *args)[0]
    np.testing.assert_allclose(together[0], changed[0], rtol=1e-6)
    # The step obeys its definition: |e score| / |sqrt(2 e) z| is the ratio asked for.
    score = mixture.score_fn(sde)(x, args[1])
    size = jnp.linalg.norm(score, axis=1)
    z = jax.random.normal(jax.random.split(jax.random.key(1), 1)[0], x.shape)
    e = 2 * (0.16 * jnp.linalg.norm(z, axis=1) / size) ** 2
    np.testing.assert_allclose(together, x + e[:, None] * score + jnp.sqrt(2 * e)[:, None] * z, rtol=1e-4, atol=1e-5)


def test_corrector_pulls_a_wrong_law_to_the_right_one():
    """400 dimensions, 500 examples, 300 steps from a variance 1.5 times too large.

    The exact answer is one; the step's size leaves 2/d + O(snr^2), below 0.02, and the draws 0.01 at 3 standard errors.
    """
    sde, s = sj.VP(), jnp.array(0.5)
    corrector = sj.langevin_corrector(sde, lambda x, t: -x, snr=0.1, num_steps=300)
    x = jnp.sqrt(1.5) * jax.random.normal(jax.random.key(0), (500, 400))
    x, _ = jax.jit(lambda x: corrector.step(jax.random.key(1), x, s, s, ()))(x)
    assert abs(float(x.var()) - 1) < 0.03


def counter():
    """A sampler that records the times it is called with and how often."""

    def step(key, x, t, s, state):
        return x + (t - s), state + 1

    return sj.Sampler(lambda x, t: jnp.zeros((), jnp.int32), step)


def test_sample_walks_the_grid_and_keeps_the_trajectory():
    ts, x = jnp.array([1.0, 0.7, 0.3, 0.1]), jnp.zeros((2, 3))
    path = sj.sample(jax.random.key(0), counter(), x, ts, trajectory=True)
    assert path.shape == (4, 2, 3)
    np.testing.assert_allclose(path[:, 0, 0], 1.0 - ts, rtol=1e-6)
    np.testing.assert_array_equal(path[-1], sj.sample(jax.random.key(0), counter(), x, ts))


def test_chain_gives_each_sampler_its_own_state_and_key():
    def noisy(key, x, t, s, state):
        return x + jax.random.normal(key, x.shape), state

    noise = sj.Sampler(lambda x, t: (), noisy)
    both = sj.chain(noise, counter(), noise)
    x, state = both.step(jax.random.key(0), jnp.zeros((2, 3)), jnp.array(1.0), jnp.array(0.5), both.init(None, None))
    assert state[1] == 1
    keys = jax.random.split(jax.random.key(0), 3)
    expected = 0.5 + sum(jax.random.normal(k, (2, 3)) for k in (keys[0], keys[2]))
    np.testing.assert_allclose(x, expected, rtol=1e-6)


def test_sampling_compiles_once_for_a_shape(mixture):
    traces = []

    @jax.jit
    def draw(key, x):
        traces.append(1)
        return sj.sample(key, sj.ddim(sj.VP(), mixture.score_fn(sj.VP())), x, timesteps.uniform(sj.VP(), 5))

    for seed in range(3):
        draw(jax.random.key(seed), jnp.ones((4, 2)))
    assert len(traces) == 1


def test_bad_input():
    with pytest.raises(ValueError, match="at least 2 times"):
        sj.sample(jax.random.key(0), counter(), jnp.zeros((2, 3)), jnp.ones(1))
    with pytest.raises(ValueError, match="eta"):
        sj.ddim(sj.VP(), lambda x, t: x, eta=2.0)
    with pytest.raises(ValueError, match="eta >= 0, and 0 with a corrector"):
        sj.dpm_solver_pp(sj.VP(), lambda x, t: x, eta=0.5, corrector=True)
    with pytest.raises(ValueError, match="order 1, 2 or 3, got 4"):
        sj.deis(sj.VP(), lambda x, t: x, order=4)
