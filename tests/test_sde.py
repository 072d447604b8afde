"""Processes against their closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import score_jax as sj


def times(sde):
    """From t_min to t_max, off the knots of a table."""
    return sde.t_min + (sde.t_max - sde.t_min) * jnp.array([1e-5, 1.23e-3, 0.1234, 0.5, 0.9, 0.99999])


def closed_forms(sde, t):
    """alpha, sigma, f and g^2 of the published processes, in float64."""
    t = np.asarray(t, np.float64)
    zero, one = np.zeros_like(t), np.ones_like(t)
    beta, integral = 0.1 + t * 19.9, 0.1 * t + 19.9 * t**2 / 2
    alpha = np.exp(-integral / 2)
    angle = np.pi / 2 * (t + 0.008) / 1.008
    cosine = np.cos(angle) / np.cos(np.pi / 2 * 0.008 / 1.008)
    betas = np.linspace(1e-4, 0.02, 1000)
    step = np.minimum((t * 1000).astype(int), 999)
    through = np.concatenate([[0], np.cumsum(np.log1p(-betas))])
    chain = np.exp(0.5 * (through[step] + (t * 1000 - step) * np.log1p(-betas[step])))
    rate = -1000 * np.log1p(-betas[step])

    def preserving(alpha, beta):
        return alpha, np.sqrt(1 - alpha**2), -beta / 2, beta

    return {
        # Song et al. 2021, Appendix B.
        "VP": lambda: (alpha, np.sqrt(-np.expm1(-integral)), -beta / 2, beta),
        "SubVP": lambda: (alpha, -np.expm1(-integral), -beta / 2, beta * -np.expm1(-2 * integral)),
        "VE": lambda: (one, 0.01 * 2000.0**t, zero, 2 * (0.01 * 2000.0**t) ** 2 * np.log(2000.0)),
        # The rest by hand: f = (log alpha)', and g^2 = -2 f where alpha^2 + sigma^2 = 1.
        "Cosine": lambda: preserving(cosine, np.pi / 1.008 * np.tan(angle)),
        "EDM": lambda: (one, t, zero, 2 * t),
        "RectifiedFlow": lambda: (1 - t, t, -1 / (1 - t), 2 * t / (1 - t)),
        "OrnsteinUhlenbeck": lambda: preserving(np.exp(-t), 2 * one),
        "DDPM": lambda: preserving(chain, rate),
    }[type(sde).__name__]()


def test_coefficients_equal_closed_forms(any_sde):
    sde, t = any_sde, times(any_sde)
    alpha, sigma, f, g2 = closed_forms(sde, t)
    np.testing.assert_allclose(sde.alpha(t), alpha, rtol=2e-5)
    np.testing.assert_allclose(sde.sigma(t), sigma, rtol=2e-5)
    x = jnp.ones((len(t), 2, 3))
    np.testing.assert_allclose(sde.drift(x, t), np.broadcast_to(f[:, None, None], x.shape), rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(sde.diffusion(t) ** 2, g2, rtol=3e-4)
    assert (jnp.diff(sde.log_snr(t)) < 0).all()


def test_diffusion_at_the_data_is_finite():
    """g(0)^2 = beta_min on VP, 2 on Ornstein-Uhlenbeck, -N log(1 - beta_1) on the chain, and 0 on SubVP."""
    ends = [sj.VP(), sj.OrnsteinUhlenbeck(), sj.DDPM(), sj.SubVP()]
    exact = [0.1, 2.0, -1000 * np.log1p(-1e-4), 0.0]
    np.testing.assert_allclose([sde.diffusion(0.0) ** 2 for sde in ends], exact, rtol=2e-3)


def test_a_constant_rate_is_an_ornstein_uhlenbeck_process():
    """beta = 2 throughout."""
    t, sde = jnp.linspace(0.01, 1, 5), sj.VP(beta_min=2.0, beta_max=2.0)
    np.testing.assert_allclose(sde.alpha(t), jnp.exp(-t), rtol=1e-6)
    np.testing.assert_allclose(sde.diffusion(t) ** 2, 2, rtol=1e-5)


def test_chains_converge_to_their_processes():
    """DDPM's marginals tend to VP's, SMLD's steps to VE's diffusion, the error halving as the scales double."""
    t, vp, ve = np.linspace(0.1, 1.0, 10), sj.VP(), sj.VE()
    errors = []
    for n in (200, 400, 800):
        betas = (0.1 + 19.9 * (np.arange(n) + 1) / n) / n  # beta(t) / n, as score-SDE discretises VP.
        ddpm = sj.DDPM(betas=betas, t_min=1 / n)
        sigma = np.asarray(ve.sigma(jnp.linspace(0, 1, n + 1)), np.float64)
        kept = np.diff(sigma**2) * n / np.asarray(ve.diffusion(jnp.linspace(0, 1, n + 1)))[1:] ** 2
        errors.append((np.abs(ddpm.log_alpha(t) - vp.log_alpha(t)).max(), np.abs(kept - 1).max()))
    first, second, third = errors
    for k in range(2):
        assert 1.8 < first[k] / second[k] < 2.2
        assert 1.8 < second[k] / third[k] < 2.2


def test_scalar_time_equals_a_batch_of_it(sde, mixture):
    x, score_fn = mixture.sample(jax.random.key(0), 5), mixture.score_fn(sde)
    for fn in (sj.reverse_drift, sj.probability_flow_drift):
        np.testing.assert_allclose(fn(sde, score_fn, x, 0.3), fn(sde, score_fn, x, jnp.full(5, 0.3)), rtol=1e-5)


def test_the_law_satisfies_the_continuity_equation(any_sde, mixture):
    """d/dt log p_t = -div(v) - v . score along the probability flow v: couples f, g and the marginal."""
    sde = any_sde
    score_fn, t = mixture.score_fn(sde), jnp.array(0.41234)
    x = mixture.marginal(sde, t).sample(jax.random.key(1), 64)

    def flow(x):
        return sj.probability_flow_drift(sde, score_fn, x[None], t)[0]

    rate = jax.vmap(lambda x: jax.jvp(lambda t: mixture.marginal(sde, t).log_prob(x), (t,), (jnp.ones(()),))[1])(x)
    divergence = jax.vmap(lambda x: jnp.trace(jax.jacfwd(flow)(x)))(x)
    transport = jnp.sum(jax.vmap(flow)(x) * score_fn(x, t), axis=1)
    np.testing.assert_allclose(rate, -divergence - transport, rtol=1e-3, atol=1e-3)
    # The reverse drift carries twice the score term (Eqs. 5 and 6).
    twice = 2 * sj.probability_flow_drift(sde, score_fn, x, t) - sde.drift(x, t)
    np.testing.assert_allclose(sj.reverse_drift(sde, score_fn, x, t), twice, rtol=1e-4, atol=1e-4)


def test_prior_density_and_draws_agree(sde):
    """4,000 draws of 3 dimensions; each bound at 5 standard errors, false alarms below 1e-5."""
    x = sj.sample_prior(jax.random.key(0), sde, (4000, 3))
    sigma = float(sde.sigma(sde.t_max))
    assert abs(float(x.std()) / sigma - 1) < 5 / np.sqrt(2 * x.size)
    assert abs(float(x.mean()) / sigma) < 5 / np.sqrt(x.size)
    expected = jax.scipy.stats.norm.logpdf(x, 0.0, sigma).sum(axis=1)
    np.testing.assert_allclose(sj.prior_log_prob(sde, x), expected, rtol=1e-4)
    assert sj.prior_log_prob(sde, x.reshape(4000, 1, 3, 1)).shape == (4000,)


def test_perturb_is_the_marginal(sde):
    x0, noise, t = jnp.full((6, 2), 2.0), jnp.full((6, 2), -1.0), times(sde)
    expected = 2 * sde.alpha(t) - sde.sigma(t)
    np.testing.assert_allclose(sj.perturb(sde, x0, noise, t)[:, 0], expected, rtol=1e-5)


def test_processes_are_pytrees():
    assert jax.tree.map(lambda v: v, sj.VP()) == sj.VP()
    gradient = jax.grad(lambda sde: sde.log_alpha(0.5))(sj.VP())
    np.testing.assert_allclose(gradient.beta_max, -0.25 * 0.5**2, rtol=1e-6)
    many = jax.vmap(lambda b: sj.VP(beta_max=b).sigma(0.5))(jnp.array([10.0, 20.0]))
    np.testing.assert_allclose(many[1], sj.VP().sigma(0.5), rtol=1e-6)
    # Of a table, too, whose gradient is no table of betas.
    gradient = jax.device_get(jax.grad(lambda sde: sde.log_alpha(1.0))(sj.DDPM()))
    np.testing.assert_allclose(gradient.betas, -0.5 / (1 - sj.DDPM().betas), rtol=1e-5)
    tables = jnp.stack([0.5 * sj.DDPM().betas, sj.DDPM().betas])
    many = jax.jit(jax.vmap(lambda b: sj.DDPM(betas=b).sigma(0.5)))(tables)
    np.testing.assert_allclose(many[1], sj.DDPM().sigma(0.5), rtol=1e-6)
    assert jax.tree.map(lambda v: True, sj.DDPM()).betas is True
    assert jax.tree.map(lambda v: True, sj.RectifiedFlow()).t_max is True


def test_a_new_process_is_two_lines():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Power(sj.SDE):
        def log_alpha(self, t):
            return -(jnp.asarray(t) ** 3)

        def log_sigma(self, t):
            return jnp.log(t)

    sde, t = Power(), jnp.array([0.2, 0.5])
    np.testing.assert_allclose(sde.drift(jnp.ones((2, 1)), t)[:, 0], -3 * t**2, rtol=1e-5)
    np.testing.assert_allclose(sde.diffusion(t) ** 2, 2 * t**2 * (1 / t + 3 * t**2), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sj.VP(beta_min=30.0), "0 < beta_min <= beta_max"),
        (lambda: sj.VE(sigma_min=0.0), "0 < sigma_min"),
        (lambda: sj.RectifiedFlow(t_max=1.0), "RectifiedFlow needs t_max below 1, .* got 1.0"),
        (lambda: sj.Cosine(t_max=1.0), "Cosine needs t_max below 1"),
        (lambda: sj.DDPM(betas=np.array([0.1, 1.5])), "betas between 0 and 1"),
        (lambda: sj.DDPM(betas=jnp.array([0.0, 0.5])), "betas between 0 and 1"),
        (lambda: sj.SubVP(t_min=2.0), "t_min < t_max"),
        (lambda: sj.expand(jnp.ones(3), jnp.ones((2, 4))), "one value an example"),
        (lambda: sj.SDE().alpha(0.5), "must define log_alpha"),
    ],
)
def test_bad_input_says_what_would_be_right(make, words):
    with pytest.raises((ValueError, NotImplementedError), match=words):
        make()


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bfloat16"])
def test_times_of_any_type_are_those_of_single_precision(any_sde, dtype):
    """An unsigned 1 is minus 255 where its sign is turned; a score gets numbers that it can divide."""
    t, exact = jnp.ones(3, dtype), jnp.ones(3)
    for name in ("log_alpha", "log_sigma", "alpha", "sigma", "log_snr", "diffusion"):
        fn = getattr(any_sde, name)
        np.testing.assert_array_equal(fn(t), fn(exact))
        np.testing.assert_array_equal(fn(1), fn(1.0))
    times, x = [], jnp.ones((3, 2))

    def score_fn(x, t):
        times.append(t)
        return -x

    for call in (sj.tweedie, sj.reverse_drift, sj.probability_flow_drift):
        np.testing.assert_array_equal(call(any_sde, score_fn, x, t), call(any_sde, score_fn, x, exact))
    assert {t.dtype for t in times} == {np.dtype("float32")}
