"""Log densities of the data: exact along the probability flow, bounded along the reverse SDE.

The probability flow  dx/dt = v(x, t)  (`ode`, Eq. 1) carries x = x(t_min) to its latent code x(t_max), and by the
change of variables along it (Chen et al. 2018, Theorem 1; Song et al. 2021, Eq. 39)

    log p_{t_min}(x) = log prior(x(t_max)) + int_{t_min}^{t_max} div v(x(t), t) dt.         (1)

The divergence is exact, or Hutchinson's estimate with probes that stay the same along the way (FFJORD, Grathwohl
et al. 2019, Eq. 8): each probe is integrated by itself, and their spread gives a standard error.

The reverse SDE has another density.  Given x_0 the path of (1)'s model is a latent variable, and with Girsanov's
theorem (Song et al. 2021, "Maximum Likelihood Training of Score-Based Diffusion Models", Theorem 3; in this
form Kingma et al. 2021, Eq. 11 and Appendix E)

    log p(x_0) >= - KL( N(alpha x_0, sigma^2 I) || prior )  at t_max
                  + E log N(x_0; x_t/alpha, sigma^2/alpha^2 I)  at t_min
                  - int g^2/2 E |score(x_t, t) + eps/sigma|^2 dt,    x_t = alpha x_0 + sigma eps.     (2)

As the prior's variance is sigma^2 at t_max, the first two terms are closed forms; in the log signal-to-noise ratio
lambda, with  g^2/sigma^2 dt = -d lambda  (`sde`, Eq. 4), and d dimensions,

    log p(x_0) >= -1/2 exp(lambda_{t_max}) |x_0|^2 - d/2 (1 + log(2 pi) - lambda_{t_min})
                  - 1/2 int E |sigma score(x_t, t) + eps|^2 d lambda.       (3)

With the exact score it is tight but for the ends: its expectation is then

    E log p_{t_min}(x_{t_min}) + d log alpha_{t_min} + E log (prior / p_{t_max})(x_{t_max}).  (4)

The reverse chain of finitely many steps, each of them Gaussian (`samplers.stochastic`, Eq. 1), has a bound of the same
ends whose integral is a sum, DDPM's (Ho et al. 2020, Eq. 5; in this form Kingma et al. 2021, Eqs. 13 and 14),

    - 1/2 sum_i (exp(lambda_{t_{i+1}} - lambda_{t_i}) - 1) E |sigma score(x_t, t) + eps|^2,  at t = t_i.      (5)

An image of 256 levels has a probability, which by Jensen's inequality is at least that of its density averaged
over the cells of its levels (Theis et al. 2016, Section 3.1): with a cell of width w in each of d dimensions

    bits/dim = -(E log p(x) / d + log w) / log 2,    x uniform in the cell of the image.     (6)

A law q(u | x) of the place u in the cell that knows the image makes the bound tighter (Ho et al. 2019, "Flow++",
Eq. 11):  log p(x + u) - log q(u | x)  for  log p(x + u).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from score_jax.batches import as_batch, as_precise, call_score, expand, square
from score_jax.divergence import check_number, draw_probes, error_of_mean, exact_divergence, probe_divergence
from score_jax.ode import integrate
from score_jax.sde import SDE, ScoreFn, perturb, prior_log_prob, probability_flow_drift
from score_jax.timesteps import draw_importance

__all__ = ["BitsPerDim", "LogProb", "bits_per_dim", "chain_elbo", "elbo", "log_prob", "place_in_cells"]


Dequantizer = Callable[[Array, Array], tuple[Array, Array]]


class LogProb(NamedTuple):
    """What `log_prob` returns."""

    log_prob: Array  # [batch], in nats, the mean over the probes
    standard_error: Array  # [batch], over the probes: NaN with a single one, 0 where the divergence is exact
    latent: Array  # [batch, *event], the state at t_max
    num_evaluations: Array  # of the score on the batch, each with its products with the probes


class BitsPerDim(NamedTuple):
    """What `bits_per_dim` returns."""

    bits_per_dim: Array  # [batch], the mean over the repeats
    standard_error: Array  # [batch], over the repeats, which vary the noise and the probes: NaN with a single one
    num_evaluations: Array  # of the score on the batch, in all repeats


def log_prob(
    key: Array,
    sde: SDE,
    score_fn: ScoreFn,
    x: Array,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    divergence: str = "hutchinson",
    num_probes: int = 1,
    probe: str = "rademacher",
    solver: str = "tsit5",
    max_steps: int = 4096,
) -> LogProb:
    """The log density of the probability flow at t_min (Eq. 1).

    Args:
      key: a PRNG key for the probes; unused where the divergence is exact.
      sde: the process.
      score_fn: `score_fn(x, t)`, rows independent; t is a scalar.
      x: data, `[batch, *event]`.
      rtol: relative tolerance of a step.
      atol: absolute tolerance of a step, in the units of `x` and in nats per dimension.
      divergence: `hutchinson`, one Jacobian-vector product a probe, or `exact`, one a dimension.
      num_probes: probes to average over.
      probe: the law of the probes, see `divergence.draw_probes`.
      solver: as in `ode_sample`.
      max_steps: as in `ode_sample`.

    Raises:
      ValueError: for an unknown divergence, probe or solver, fewer than 1 probe, or a tolerance that is not positive;
        if x is not floating point or has no batch axis, or the score has not its shape.
      SolverError: if the solver stops early, saying where; under `jit` the result is NaN instead.
    """
    if divergence not in ("hutchinson", "exact"):
        raise ValueError(f"unknown divergence {divergence!r}: choose 'hutchinson' or 'exact'")
    check_number("num_probes", num_probes)
    exact, x = divergence == "exact", as_batch(x)
    keys = jax.random.split(key, num_probes)
    probes = None if exact else jax.vmap(lambda k: draw_probes(k, x.shape, probe, x.dtype))(keys)
    # The integrals are kept per dimension, of the size of x whatever the dimension is.
    start = x, jnp.zeros((len(x), 1 if exact else num_probes), x.dtype)
    args = (sde, score_fn, probes)
    (latent, change), num_evaluations = integrate(
        _flow, args, start, sde.t_min, sde.t_max, rtol=rtol, atol=atol, solver=solver, max_steps=max_steps
    )
    estimates = math.prod(x.shape[1:]) * change.T
    error = jnp.zeros(len(x), x.dtype) if exact else error_of_mean(estimates)
    return LogProb(prior_log_prob(sde, latent) + jnp.mean(estimates, axis=0), error, latent, num_evaluations)


def _flow(t: Array, state: tuple[Array, Array], args: tuple[SDE, ScoreFn, Array | None]) -> tuple[Array, Array]:
    """The drift `[batch, *event]` and, for each probe, its divergence per dimension `[batch, num_probes]`."""
    sde, score_fn, probes = args
    x = state[0]

    def field(x: Array) -> Array:
        return probability_flow_drift(sde, score_fn, x, t)

    if probes is None:
        value, divergence = exact_divergence(field, x)
        divergence = divergence[None]
    else:
        value, divergence = probe_divergence(field, x, probes)
    return value.astype(x.dtype), (divergence.T / math.prod(x.shape[1:])).astype(x.dtype)


def bits_per_dim(
    key: Array,
    sde: SDE,
    score_fn: ScoreFn,
    images: Array,
    *,
    centered: bool,
    dequantized: bool,
    num_repeats: int = 1,
    dequantizer: Dequantizer | None = None,
    **options: Any,
) -> BitsPerDim:
    """Bits per dimension of images with dequantization (Eq. 6): an upper bound, unbiased.

    The cells of the levels are those of the data that the network was trained on, see `place_in_cells`.

    Args:
      key: a PRNG key for the noise u and the probes.
      sde: the process.
      score_fn: `score_fn(x, t)`, rows independent; t is a scalar.
      images: uint8 `[batch, h, w, c]`.
      centered: as in `place_in_cells`.
      dequantized: as in `place_in_cells`.
      num_repeats: draws of the noise and the probes to average over.
      dequantizer: `dequantizer(key, images) -> (u, log q(u | images) [batch])` with u in (0, 1), in the shape of the
        images, see `networks.Dequantizer`; None draws u uniformly.
      **options: the keyword arguments of `log_prob`.

    Raises:
      ValueError: if the images are not uint8, or there is no repeat; and as `log_prob` does.
      SolverError: as `log_prob` does.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"bits per dimension are of uint8 images, but these are {images.dtype}")
    check_number("num_repeats", num_repeats)
    bits, num_evaluations = [], jnp.zeros((), int)
    for k in jax.random.split(key, num_repeats):
        key_noise, key_probes = jax.random.split(k)
        if dequantizer is None:
            u, log_q = jax.random.uniform(key_noise, images.shape), jnp.zeros(len(images))
        else:
            u, log_q = dequantizer(key_noise, images)
        x, log_width = place_in_cells(images, u, centered=centered, dequantized=dequantized)
        result = log_prob(key_probes, sde, score_fn, x, **options)
        bits.append(-((result.log_prob - log_q) / math.prod(x.shape[1:]) + log_width) / math.log(2))
        num_evaluations += result.num_evaluations
    repeats = jnp.stack(bits)
    return BitsPerDim(jnp.mean(repeats, axis=0), error_of_mean(repeats), num_evaluations)


def place_in_cells(images: Array, u: Array, *, centered: bool, dequantized: bool) -> tuple[Array, float]:
    """Where images with noise u in [0, 1) lie in the data that a network was trained on, and the log of a cell's width.

    Trained on (x + u)/256 they lie there, w = 1/256; trained on x/255 at (x + u - 1/2)/255, w = 1/255, in the cells
    whose centres it knows (`data.to_float`).

    Args:
      images: uint8 `[batch, h, w, c]`.
      u: in the shape of the images.
      centered: whether the network was trained on data mapped from [0, 1] to [-1, 1].
      dequantized: whether it was trained on (x + u)/256; otherwise on x/255.
    """
    levels, offset = (256, 0.0) if dequantized else (255, 0.5)
    stretch, shift = (2, 1) if centered else (1, 0)
    return stretch * (jnp.asarray(images, float) + u - offset) / levels - shift, math.log(stretch / levels)


def elbo(key: Array, sde: SDE, score_fn: ScoreFn, x: Array, *, num_draws: int = 1) -> tuple[Array, Array]:
    """An unbiased estimate of the reverse SDE's evidence lower bound (Eq. 3), in nats.

    The reverse SDE runs from the prior to t_min and ends with  x_0 = x/alpha + sigma/alpha eps.

    Args:
      key: a PRNG key for times and noise.
      sde: the process.
      score_fn: `score_fn(x, t)`, with t `[batch]`.
      x: data, `[batch, *event]`.
      num_draws: times and noises, one evaluation of the score each, to average over.

    Returns:
      `(bound [batch], standard_error [batch])`, the error being NaN with a single draw.  The times of a draw are
      spread over the batch, so the error of a mean over the batch is less than its examples' errors suggest.

    Raises:
      ValueError: for fewer than 1 draw.
    """
    check_number("num_draws", num_draws)
    x = as_batch(x)
    size = math.prod(x.shape[1:])
    first, last = sde.log_snr(sde.t_min), sde.log_snr(sde.t_max)

    def draw(inputs: tuple[Array, Array]) -> Array:
        k, t = inputs
        noise = jax.random.normal(k, x.shape, x.dtype)
        residual = expand(sde.sigma(t), x) * call_score(score_fn, perturb(sde, x, noise, t), t) + noise
        # On standard normal data the noise is left with the factor sigmoid(lambda): what that alone contributes has a
        # known mean, and without its fluctuation the variance is far less.
        excess = jax.nn.sigmoid(sde.log_snr(t)) ** 2 * (square(noise) - size)
        return 0.5 * (first - last) * (square(residual) - excess)

    key_t, key_order, key_noise = jax.random.split(key, 3)
    # Uniform in lambda.  Each draw has a part of the range, and each example, hence the shuffle, any place in it.
    t = draw_importance(key_t, sde, num_draws * len(x))[0].reshape(num_draws, len(x))
    t = jax.random.permutation(key_order, t, axis=1, independent=True)
    path = jax.lax.map(draw, (jax.random.split(key_noise, num_draws), t))
    # Neighbouring parts differ by little but their noise.
    error = jnp.sqrt(jnp.mean(jnp.diff(path, axis=0) ** 2, axis=0) / (2 * num_draws))
    return _ends(sde, x) - jnp.mean(path, axis=0), error


def chain_elbo(key: Array, sde: SDE, score_fn: ScoreFn, x: Array, ts: Array | Sequence[float]) -> Array:
    """An unbiased estimate of the evidence lower bound of the chain of ancestral steps along a grid (Eq. 5), in nats.

    Args:
      key: a PRNG key, split into one for each step.
      sde: the process.
      score_fn: `score_fn(x, t)`, t a scalar.
      x: data, `[batch, *event]`.
      ts: the chain's times, `[n + 1]`, decreasing; for the published chain of `DDPM`, whose times are 1 ... 1/1000 and
        whose step to the data is the closed form at t_min, `timesteps.uniform(sde, 999)`.

    Returns:
      `[batch]`, of one draw of noise for each step.
    """
    x = as_batch(x)

    def term(total: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        k, t, s = inputs
        noise = jax.random.normal(k, x.shape, x.dtype)
        residual = sde.sigma(t) * call_score(score_fn, perturb(sde, x, noise, t), t) + noise
        return total + 0.5 * jnp.expm1(sde.log_snr(s) - sde.log_snr(t)) * square(residual), None

    ts = as_precise(ts, x)
    keys = jax.random.split(key, len(ts) - 1)
    total, _ = jax.lax.scan(term, jnp.zeros(len(x), x.dtype), (keys, ts[:-1], ts[1:]))
    return _ends(sde, x) - total


def _ends(sde: SDE, x: Array) -> Array:
    """The closed forms of Eq. 3, `[batch]`."""
    first, last = sde.log_snr(sde.t_min), sde.log_snr(sde.t_max)
    size = math.prod(x.shape[1:])
    return -0.5 * jnp.exp(last) * square(x) - 0.5 * size * (1 + math.log(2 * math.pi) - first)
