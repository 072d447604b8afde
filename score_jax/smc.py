"""Twisted sequential Monte Carlo: weighted particles whose law is the posterior, in the limit of many.

For y = A x_0 + noise_std n the particles follow the reverse process of the prior with a guided score, and weights
account for the guidance (Wu et al. 2023, "Practical and Asymptotically Exact Conditional Sampling in Diffusion
Models", Algorithm 1).  With the twisting function

    psi_t(x_t) = N(y; A E[x_0 | x_t], (noise_std^2 + r_t^2) I),    r_t as in `inverse`, Eq. 4,              (1)

the kernel p(x_s | x_t) of ancestral sampling (`samplers.stochastic`, Eq. 1) and the same kernel p~ with the score
plus grad log psi_t, a step from t to s multiplies the weight by

    p(x_s | x_t) psi_s(x_s) / (p~(x_s | x_t) psi_t(x_t)).                   (2)

The products telescope: whatever psi_t, at the end the weights are those of the posterior if the last psi is the
likelihood, and their mean estimates the evidence p(y) without bias (both for the law that the steps sample).  Where
psi_t is a poor guess, between the modes of a mixture say, few particles come to weigh much, and errors fall slower
than n^-1/2; a larger `data_std` and more steps helped little there.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from score_jax.batches import as_batch, as_floating, as_precise, dot, square
from score_jax.divergence import check_number
from score_jax.inverse import Forward, check_measurement, posterior_variance
from score_jax.parameterization import tweedie
from score_jax.samplers.base import check_finite
from score_jax.samplers.stochastic import ancestral_kernel
from score_jax.sde import SDE, ScoreFn
from score_jax.timesteps import lattice

__all__ = ["Particles", "twisted_smc"]


class Particles(NamedTuple):
    """A weighted sample.

    Attributes:
      x: `[n, *event]`.
      log_weights: `[n]`, of weights that sum to one.
      log_evidence: scalar, an estimate of log p(y) in nats.
    """

    x: Array
    log_weights: Array
    log_evidence: Array


def twisted_smc(
    key: Array,
    sde: SDE,
    score_fn: ScoreFn,
    y: Array,
    forward: Forward,
    x: Array,
    ts: Array | Sequence[float],
    *,
    noise_std: float | Array,
    data_std: float | Array = 1.0,
    threshold: float = 0.5,
) -> Particles:
    """Particles of the posterior given one measurement (Wu et al. 2023, Algorithm 1); for several, `vmap` over y.

    Args:
      key: a PRNG key.
      sde: the process.
      score_fn: the prior's `score_fn(x, t)`, rows independent.
      y: one measurement, `[*measurement]`.
      forward: A as a function of a batch, `[n, *event]` to `[n, *measurement]`, of norm about one; any function that
        has a gradient will do.
      x: particles at `ts[0]`, `[n, *event]`, from `sample_prior`.
      ts: decreasing times.
      noise_std: the standard deviation of the noise in `y`, positive.
      data_std: that of the data, in each coordinate; for the twisting function only.
      threshold: the effective number of particles, in units of n, below which they are resampled.

    Raises:
      ValueError: if noise_std is not positive, there is no particle or `y` does not fit.
      FloatingPointError: if the particles are not finite, naming the step; under `jit` they are returned as they are.
    """
    if isinstance(noise_std, int | float) and noise_std <= 0:
        raise ValueError(f"twisted_smc needs noise_std > 0, got {noise_std}")
    x = as_batch(x)
    check_number("the number of particles", len(x))
    y, ts = jnp.expand_dims(as_floating(y, "y"), 0), as_precise(ts, x)
    check_measurement(y, jax.eval_shape(forward, x[:1]))

    def log_likelihood(x0: Array, variance: float | Array) -> Array:
        constant = 0.5 * y.size * jnp.log(2 * math.pi * variance)
        return -0.5 * square(y - forward(x0)) / variance - constant

    def twist(x: Array, t: Array) -> tuple[Array, Array, Array]:
        def total(x: Array) -> tuple[Array, tuple[Array, Array]]:
            score = score_fn(x, t)
            variance = noise_std**2 + posterior_variance(sde, t, data_std)
            value = log_likelihood(tweedie(sde, lambda x, t: score, x, t), variance)
            return jnp.sum(value), (value, score)

        slope, (value, score) = jax.grad(total, has_aux=True)(x)
        return value, score, slope

    def body(carry: tuple[Array, Array], inputs: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (x, log_weights), (k, t, s) = carry, inputs
        key_resample, key_move = jax.random.split(k)
        value, score, slope = twist(x, t)
        log_weights, chosen = _resample(key_resample, log_weights + value, threshold)
        x, value, score, slope = (a[chosen] for a in (x, value, score, slope))
        ratio, gain, std = ancestral_kernel(sde, t, s)
        z, push = jax.random.normal(key_move, x.shape, x.dtype), gain * slope / jnp.where(std > 0, std, 1.0)
        x = ratio * x + gain * score + std * (z + push)
        log_weights = log_weights - value - dot(push, z) - 0.5 * square(push)
        return (x, log_weights), jnp.isfinite(x).all()

    keys = jax.random.split(key, len(ts) - 1)
    (x, log_weights), finite = jax.lax.scan(body, (x, jnp.zeros_like(square(x))), (keys, ts[:-1], ts[1:]))
    check_finite(finite, "step", advice="take more steps")
    x = tweedie(sde, score_fn, x, ts[-1])
    log_weights = log_weights + log_likelihood(x, noise_std**2)
    total = jax.nn.logsumexp(log_weights)
    return Particles(x, log_weights - total, total - math.log(len(x)))


def _resample(key: Array, log_weights: Array, threshold: float) -> tuple[Array, Array]:
    """Systematic resampling where few particles carry the weight: the new weights and which particles are kept.

    The mean of the weights is left as it is, and so the evidence.
    """
    n = len(log_weights)
    total = jax.nn.logsumexp(log_weights)
    effective = jnp.exp(2 * total - jax.nn.logsumexp(2 * log_weights))
    cumulative = jnp.cumsum(jnp.exp(log_weights - total))
    # Rounding may leave the sum below the last place.
    chosen = jnp.minimum(jnp.searchsorted(cumulative, lattice(key, n)), n - 1)
    low = effective < threshold * n
    return (
        jnp.where(low, total - math.log(n), log_weights),
        jnp.where(low, chosen, jnp.arange(n)),
    )
