"""Every sampler on the exact score of a mixture: its law, its order, and the contract."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OTHERS, PROCESSES, mode_share, moments

import score_jax as sj
from score_jax import timesteps

N = 4_000


def corrected(make, corrector):
    """A predictor and a corrector."""
    return lambda sde, score_fn: sj.chain(make(sde, score_fn), corrector(sde, score_fn))


# Steps enough for a discretisation error well below the statistical one.
SAMPLERS = {
    "euler_maruyama": (sj.euler_maruyama, 200),
    "reverse_diffusion": (sj.reverse_diffusion, 200),
    "ancestral": (sj.ancestral, 200),
    "ancestral, annealed Langevin": (corrected(sj.ancestral, sj.annealed_langevin_corrector), 100),
    "ddim": (sj.ddim, 200),
    "ddim, eta 1/2": (lambda sde, s: sj.ddim(sde, s, eta=0.5), 200),
    "euler": (sj.euler, 300),
    "heun": (sj.heun, 60),
    "stochastic_heun": (lambda sde, s: sj.stochastic_heun(sde, s, churn=0.1), 60),
    "dpm_solver_pp_singlestep": (sj.dpm_solver_pp_singlestep, 40),
    "dpm_solver_pp": (sj.dpm_solver_pp, 50),
    "sde_dpm_solver_pp": (sj.sde_dpm_solver_pp, 100),
    "unipc": (sj.unipc, 40),
    "deis": (sj.deis, 60),
    "adams_bashforth": (sj.adams_bashforth, 100),
    "picard": (lambda sde, s: sj.picard(sde, s, num_points=10), 20),
    "adaptive_sde": (lambda sde, s: sj.adaptive_sde(sde, s, rtol=0.05, atol=0.02), 1),
    "ddpm": (sj.ddpm, 300),
}


def parameterizations(sde, score_fn):
    """The score as networks of each kind, exact ones, would give it."""

    def alpha(x, t):
        return sj.expand(sde.alpha(t), x)

    def sigma(x, t):
        return sj.expand(sde.sigma(t), x)

    def noise(x, t):
        return -sigma(x, t) * score_fn(x, t)

    def data(x, t):
        return sj.tweedie(sde, score_fn, x, t)

    def inner(y, cond):
        """EDM's F, from what it is given: y = c_in x / alpha and log(sigma / alpha) / 4."""
        t = timesteps.time_of_log_snr(sde, -8 * cond)
        level = sj.expand(jnp.exp(4 * cond), y)
        root = jnp.sqrt(level**2 + 0.25)
        skip, out = 0.25 / root**2, 0.5 * level / root
        return (data(alpha(y, t) * root * y, t) - skip * root * y) / out

    return {
        "from_score": sj.from_score(sde, score_fn),
        "from_noise": sj.from_noise(sde, noise),
        "from_denoiser": sj.from_denoiser(sde, data),
        "from_velocity": sj.from_velocity(sde, lambda x, t: alpha(x, t) * noise(x, t) - sigma(x, t) * data(x, t)),
        "preconditioned": sj.preconditioned(sde, inner),
    }


def test_parameterizations_are_one_score(any_sde, mixture):
    """What a sampler sees of a network is its score: the same from all, at all times, so the matrix below is whole."""
    score_fn = mixture.score_fn(any_sde)
    t = timesteps.log_snr(any_sde, 63)
    x = sj.perturb(any_sde, mixture.sample(jax.random.key(0), 64), jax.random.normal(jax.random.key(1), (64, 2)), t)
    mean = sj.tweedie(any_sde, score_fn, x, t)
    for name, same in parameterizations(any_sde, score_fn).items():
        np.testing.assert_allclose(sj.tweedie(any_sde, same, x, t), mean, atol=2e-4, err_msg=name)


def start(sde, mixture, n):
    """Samples `[n, 2]` of the exact marginal at t_max, outside what each test compiles."""
    return mixture.marginal(sde, sde.t_max).sample(jax.random.key(2), n)


def energy_distance(a, b):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, without bias."""

    def mean(p, q):
        return np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1)).sum() / (len(p) * (len(q) - (p is q)))

    return 2 * mean(a, b) - mean(a, a) - mean(b, b)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_law(any_sde, mixture, name):
    """4,000 samples from the exact marginal at t_max on every process, the parameterizations taking turns.

    Bounds: 4.5 standard errors (false alarms below 1e-3 over all cases) plus a discretisation error, 0.02 in the mean,
    0.05 in a covariance and 0.005 in the mode's weight.  The energy distance of 1,000 to 1,000 samples, without bias,
    is mostly  5.6 (w - w')^2  of the modes' weights, 0.0023 times a chi-squared variable less one: below 0.04 but
    for 3 cases in 100,000 where the laws agree.
    """
    sde, (make, steps) = any_sde, SAMPLERS[name]
    n = 2000 if name in ("adaptive_sde", "picard") else N
    turn = (list(SAMPLERS).index(name) + list(PROCESSES | OTHERS).index(type(sde).__name__)) % 5

    score_fn = list(parameterizations(sde, mixture.score_fn(sde)).values())[turn]

    @jax.jit
    def draw(key, x, ts):
        x = sj.sample(key, make(sde, score_fn), x, ts)
        return sj.tweedie(sde, score_fn, x, sde.t_min)

    x = np.asarray(draw(jax.random.key(0), start(sde, mixture, n), timesteps.log_snr(sde, steps)))
    mean, cov = (np.asarray(moment) for moment in moments(mixture))
    np.testing.assert_allclose(x.mean(0), mean, atol=4.5 * np.sqrt(cov.max() / n) + 0.02)
    np.testing.assert_allclose(np.cov(x.T), cov, atol=4.5 * cov.max() * np.sqrt(2 / n) + 0.05)
    share = mode_share(mixture, x)
    assert abs(float(share.mean()) - 0.7) < 4.5 * np.sqrt(0.21 / n) + 0.005
    # Within each mode, too: the covariance of the whole is mostly the distance of the modes.
    near = x[share > 0.5]
    np.testing.assert_allclose(np.cov(near.T), mixture.covariances[0], atol=4.5 * 0.3 * np.sqrt(2 / len(near)) + 0.02)
    distance = energy_distance(x[:2000:2], np.asarray(mixture.sample(jax.random.key(1), 1000)))
    assert distance < 0.04, distance


def whole(make, **options):
    """A multistep sampler without its last step of order one, which is not the method's."""
    return lambda sde, score_fn: make(sde, score_fn, lower_order_final=False, **options)


ORDERS = {
    "euler": (sj.euler, 1, (40, 160)),
    "ddim": (sj.ddim, 1, (40, 160)),
    "heun": (sj.heun, 2, (40, 160)),
    "dpm_solver_pp 1": (whole(sj.dpm_solver_pp, order=1), 1, (40, 160)),
    "dpm_solver_pp 2": (whole(sj.dpm_solver_pp, order=2), 2, (40, 160)),
    "dpm_solver_pp 2, midpoint": (whole(sj.dpm_solver_pp, solver_type="midpoint"), 2, (40, 160)),
    "dpm_solver_pp 3": (whole(sj.dpm_solver_pp, order=3), 3, (40, 160)),
    "unipc 1": (whole(sj.unipc, order=1), 2, (40, 160)),
    "unipc 2": (whole(sj.unipc, order=2), 3, (40, 160)),
    "deis 2": (whole(sj.deis, order=2), 2, (40, 160)),
    "deis 2, corrected": (whole(sj.deis, order=2, corrector=True), 3, (40, 160)),
    "deis 3": (whole(sj.deis, order=3), 3, (80, 160)),
    "adams_bashforth 2": (whole(sj.adams_bashforth, order=2), 2, (80, 320)),
    "dpm_solver_pp_singlestep": (sj.dpm_solver_pp_singlestep, 2, (40, 160)),
    "picard": (lambda sde, s: sj.picard(sde, s, num_points=4, tolerance=0.0), 1, (20, 80)),
}


@pytest.fixture(scope="module", params=PROCESSES)
def exact_path(request, mixture):
    """A process, 256 samples at its t_max and an adaptive solution from there, within 1e-5."""
    sde = type(PROCESSES[request.param])(t_min=1e-2)
    x = mixture.marginal(sde, sde.t_max).sample(jax.random.key(0), 256)
    return sde, x, sj.ode_sample(sde, mixture.score_fn(sde), x, rtol=1e-6, atol=1e-6, solver="dopri8")


@pytest.mark.parametrize("name", ORDERS)
def test_deterministic_samplers_converge_with_their_order(exact_path, mixture, name):
    """The error falls as n^-order.  The loop is Python's: one compiled step for all numbers of them."""
    make, order, steps = ORDERS[name]
    sde, x, exact = exact_path
    sampler = make(sde, mixture.score_fn(sde))
    step, key = jax.jit(sampler.step), jax.random.key(1)

    def solve(n):
        ts = list(timesteps.log_snr(sde, n))
        end, state = x, jax.jit(sampler.init)(x, ts[0])
        for t, s in itertools.pairwise(ts):
            end, state = step(key, end, t, s, state)
        return end

    errors = [float(jnp.median(jnp.linalg.norm(solve(n) - exact, axis=1))) for n in steps]
    measured = np.log(errors[0] / errors[1]) / np.log(steps[1] / steps[0])
    assert order - 0.25 < measured < order + 0.5, (errors, measured)


@pytest.mark.parametrize("name", ["euler_maruyama", "reverse_diffusion", "ancestral", "ddpm"])
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


@pytest.mark.parametrize("name", ["ddpm", "ancestral"])
def test_noise_of_the_chain(name):
    """Ho et al. 2020, Section 3.2, from k = 5 to 4: beta_k, or times (1 - kept_{k-1}) / (1 - kept_k), 0.79.

    Without a score, from 0.  20,000 numbers, 4.5 standard errors (false alarms below 1e-5 each).
    """
    sde, k = sj.DDPM(), 5
    kept = np.cumprod(1 - sde.betas.astype(np.float64))
    expected = sde.betas[k - 1] * (1 if name == "ddpm" else (1 - kept[k - 2]) / (1 - kept[k - 1]))
    sampler = getattr(sj, name)(sde, lambda x, t: 0 * x)
    x = sampler.step(jax.random.key(0), jnp.zeros((10_000, 2)), jnp.array(k / 1000), jnp.array((k - 1) / 1000), ())[0]
    assert abs(float(x.var()) / expected - 1) < 4.5 * np.sqrt(2 / x.size)


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
    # As published one step serves the batch, of the norms' means.
    averaged = sj.langevin_corrector(sde, mixture.score_fn(sde), batch_averaged=True)
    e = 2 * (0.16 * jnp.linalg.norm(z, axis=1).mean() / size.mean()) ** 2
    moved = averaged.step(jax.random.key(1), x, *args)[0]
    np.testing.assert_allclose(moved, x + e * score + jnp.sqrt(2 * e) * z, rtol=1e-4, atol=1e-5)


def test_corrector_pulls_a_wrong_law_to_the_right_one():
    """400 dimensions, 500 examples, 300 steps from a variance 1.5 times too large.

    The exact answer is one; the step's size leaves 2/d + O(snr^2), below 0.02, and the draws 0.01 at 3 standard errors.
    """
    sde, s = sj.VP(), jnp.array(0.5)
    corrector = sj.langevin_corrector(sde, lambda x, t: -x, snr=0.1, num_steps=300)
    x = jnp.sqrt(1.5) * jax.random.normal(jax.random.key(0), (500, 400))
    x, _ = jax.jit(lambda x: corrector.step(jax.random.key(1), x, s, s, ()))(x)
    assert abs(float(x.var()) - 1) < 0.03


CORRECTED = {"unipc": sj.unipc, "deis": lambda sde, score_fn: sj.deis(sde, score_fn, order=2, corrector=True)}


@pytest.mark.parametrize("name", CORRECTED)
def test_a_multistep_corrector_keeps_what_langevin_moved(name):
    """N(0, I) stays N(0, I): 40,000 numbers, 4.5 standard errors (false alarms below 1e-5) and 0.03 for 160 steps.

    Were a step, taken again, to put x where it leads, what Langevin moved would be lost.
    """
    sde, score_fn = sj.VP(), lambda x, t: -x
    make = corrected(CORRECTED[name], lambda *a: sj.annealed_langevin_corrector(*a, num_steps=10))
    run = jax.jit(lambda k, x: sj.sample(k, make(sde, score_fn), x, timesteps.log_snr(sde, 160)))
    x = run(jax.random.key(0), jax.random.normal(jax.random.key(1), (20_000, 2)))
    assert abs(float(x.var()) - 1) < 4.5 * np.sqrt(2 / x.size) + 0.03


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
    for make, options, match in (
        (sj.stochastic_heun, {"churn": -0.1}, "churn >= 0, got -0.1"),
        (sj.dpm_solver_pp_singlestep, {"ratio": 0.0}, "0 < ratio <= 1, got 0.0"),
        (sj.adaptive_sde, {"rtol": 0.0}, "positive tolerances, got rtol=0.0"),
        (sj.ancestral, {"variance": "large"}, "'posterior' or 'forward', got 'large'"),
        (sj.picard, {"num_points": 0}, "num_points >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            make(sj.VP(), lambda x, t: x, **options)
    for options in ({"solver_type": "euler"}, {"solver_type": "midpoint", "order": 3}):
        with pytest.raises(ValueError, match="solver_type"):
            sj.dpm_solver_pp(sj.VP(), lambda x, t: x, **options)
    with pytest.raises(ValueError, match="order 1, 2 or 3, got 4"):
        sj.deis(sj.VP(), lambda x, t: x, order=4)
