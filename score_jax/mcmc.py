"""Markov chains and normalising constants where an energy exists: p(x) = exp(-E(x)) / Z.

Hamiltonian Monte Carlo (Duane et al. 1987; Neal 2011) draws a momentum r ~ N(0, M) and moves along

    dx = M^-1 r dt,    dr = -grad E(x) dt                                   (1)

by leapfrog steps of size e.  Accepting the end point with probability  min(1, exp(H - H')),
H = E(x) + r^T M^-1 r / 2,  leaves p invariant whatever e is.  With a single step this is the Metropolis-adjusted
Langevin algorithm, MALA (Roberts and Tweedie 1996; Neal 2011), whose proposal

    x' = x - e^2/2 M^-1 grad E(x) + e M^-1/2 z,    z ~ N(0, I),             (2)

is `unadjusted_langevin` of step size e^2.  NUTS (Hoffman and Gelman 2014) chooses the number of steps by itself.

Annealed importance sampling (Neal 2001, Section 2) estimates Z.  From exact draws x_0 of a normalised density p_0,
and with transitions x_(k-1) -> x_k that leave f_k invariant,

    f_k = p_0^(1 - b_k) exp(-b_k E),    0 = b_0 < b_1 < ... < b_n = 1,      (3)

    log w = sum_(k=1..n) (b_k - b_(k-1)) (-E(x_(k-1)) - log p_0(x_(k-1))),    E[w] = Z.    (4)

An energy maps `[batch, *event]` to `[batch]`, rows independent.  The kernels, the adaptation of the step size and
the diagnostics are blackjax's.  Every call compiles: call it inside `jax.jit` to compile once.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.step_size import dual_averaging_adaptation
from blackjax.diagnostics import effective_sample_size, potential_scale_reduction
from jax import Array
from jax.typing import ArrayLike

from score_jax.analytic import GaussianMixture
from score_jax.divergence import check_number

__all__ = ["AnnealedImportance", "Chains", "annealed_importance_sampling", "hmc", "mala", "nuts"]

Energy = Callable[[Array], Array]
Kernel = Callable[..., tuple[Any, Any]]  # (key, state, log density, step size, inverse mass matrix) -> (state, info)

# Warm-up windows: the mass matrix of each is the variance seen in the one before.
WINDOWS = 4

# The pilot run of annealing: its particles, the acceptance rate that it aims for, which is the best for HMC in many
# dimensions (Beskos et al. 2013), and what log e gains per unit of excess at each temperature.
NUM_PILOTS, ANNEALED_ACCEPTANCE, GAIN = 64, 0.65, 0.5


class Chains(NamedTuple):
    """What `mala`, `hmc` and `nuts` return; with fewer than 4 samples the last two are NaN."""

    samples: Array  # [num_samples, chains, *event], after warm-up
    acceptance_rate: Array  # [chains], the mean acceptance probability (with NUTS also over the trajectory)
    step_size: Array  # the leapfrog step e, a scalar
    inverse_mass_matrix: Array  # [*event], the diagonal of M^-1
    num_divergent: Array  # [chains], transitions with an energy error above 1,000; any at all is a bad sign
    effective_sample_size: Array  # [*event], of all chains together, for the mean
    r_hat: Array  # [*event], potential scale reduction of chains split in halves; above 1.01 they have not mixed


def mala(
    key: Array, energy: Energy, x: Array, *, num_samples: int, num_warmup: int = 1000, target_acceptance: float = 0.574
) -> Chains:
    """The Metropolis-adjusted Langevin algorithm (Eq. 2), one gradient a sample.

    All chains share one step size and one diagonal mass matrix, fitted to all of them in warm-up; after it they
    are fixed and the chains independent.

    Args:
      key: a PRNG key.
      energy: E, `[batch, *event]` to `[batch]`, rows independent, differentiable.
      x: the chains' starts, `[chains, *event]`; spread wide, so that `r_hat` means something.
      num_samples: samples of each chain.
      num_warmup: steps of each chain to adapt in and discard, rounded down to a multiple of 4.
      target_acceptance: what the step size is adapted to; the default is the best in many dimensions (Roberts and
        Rosenthal 1998).

    Raises:
      ValueError: if `num_samples < 1`, `num_warmup < 4`, the energy is not of shape `[batch]`, or it is not
        finite at a start (not seen under `jit`).
    """
    return _run(key, energy, x, _hmc_kernel(1, jitter=0.0), num_samples, num_warmup, target_acceptance)


def hmc(
    key: Array,
    energy: Energy,
    x: Array,
    *,
    num_samples: int,
    num_warmup: int = 1000,
    num_integration_steps: int = 10,
    target_acceptance: float = 0.8,
) -> Chains:
    """Hamiltonian Monte Carlo (Eq. 1), `num_integration_steps` gradients a sample.

    Each trajectory draws its step size, uniform on e/2 to 3e/2: one of fixed length can be near a period of the
    dynamics and come back to where it began (Neal 2011 on the choice of the step size).

    Args, and errors, as `mala`, and
      num_integration_steps: leapfrog steps of a trajectory, at least 1.
    """
    kernel = _hmc_kernel(num_integration_steps, jitter=0.5)
    return _run(key, energy, x, kernel, num_samples, num_warmup, target_acceptance)


def nuts(
    key: Array,
    energy: Energy,
    x: Array,
    *,
    num_samples: int,
    num_warmup: int = 1000,
    max_num_doublings: int = 10,
    target_acceptance: float = 0.8,
) -> Chains:
    """The no-U-turn sampler, by multinomial choice along the trajectory (Betancourt 2017).

    The chains move in step, so each sample costs as many gradients as the longest trajectory of all.

    Args, and errors, as `mala`, and
      max_num_doublings: the longest trajectory has 2 to this power of steps.
    """
    transition = blackjax.nuts.build_kernel()

    def kernel(*args: Any) -> tuple[Any, Any]:
        return transition(*args, max_num_doublings=max_num_doublings)

    return _run(key, energy, x, kernel, num_samples, num_warmup, target_acceptance)


def _hmc_kernel(num_integration_steps: int, *, jitter: float) -> Kernel:
    check_number("num_integration_steps", num_integration_steps)
    transition = blackjax.hmc.build_kernel()

    def kernel(key, state, log_density, step_size, inverse_mass_matrix):
        key_step, key = jax.random.split(key)
        step_size = step_size * jax.random.uniform(key_step, minval=1 - jitter, maxval=1 + jitter)
        return transition(key, state, log_density, step_size, inverse_mass_matrix, num_integration_steps)

    return kernel


def _move_all(kernel: Kernel, key: Array, states: Any, *args: Any) -> tuple[Any, Any]:
    """One transition of every chain; `args` are what the chains share."""
    keys = jax.random.split(key, len(states.position))
    return jax.vmap(lambda k, state: kernel(k, state, *args))(keys, states)


def _run(
    key: Array, energy: Energy, x: Array, kernel: Kernel, num_samples: int, num_warmup: int, target: float
) -> Chains:
    """Warm-up and sampling, the same for every kernel; inside, positions are `[chains, d]`."""
    check_number("num_samples", num_samples)
    check_number("num_warmup", num_warmup, least=WINDOWS)
    _check_shape(energy, x)
    if not isinstance(start := energy(x), jax.core.Tracer) and not np.isfinite(start).all():
        bad = np.flatnonzero(~np.isfinite(start)).tolist()
        raise ValueError(f"the energy is not finite at the start of chains {bad}: start them where exp(-E) > 0")
    chains, event = x.shape[0], x.shape[1:]
    log_density = _by_row(lambda x: -energy(x), event)

    def move(key: Array, states: Any, step_size: Array, inverse_mass: Array) -> tuple[Any, Any]:
        return _move_all(kernel, key, states, log_density, step_size, inverse_mass)

    @jax.jit
    def run(key: Array, x: Array) -> Chains:
        key_warmup, key_sample = jax.random.split(key)
        # The states of NUTS are those of HMC.
        states = jax.vmap(lambda row: blackjax.hmc.init(row, log_density))(x.reshape(chains, -1))
        states, step_size, inverse_mass = _warm_up(key_warmup, move, states, num_warmup, target)

        def step(states: Any, k: Array) -> tuple[Any, tuple[Array, Array, Array]]:
            states, info = move(k, states, step_size, inverse_mass)
            return states, (states.position, info.acceptance_rate, info.is_divergent)

        _, (samples, rates, divergent) = jax.lax.scan(step, states, jax.random.split(key_sample, num_samples))
        return Chains(
            samples.reshape(num_samples, *x.shape),
            rates.mean(axis=0),
            step_size,
            inverse_mass.reshape(event),
            divergent.sum(axis=0),
            *(value.reshape(event) for value in _diagnose(samples)),
        )

    return run(key, x)


def _warm_up(
    key: Array, move: Callable[..., tuple[Any, Any]], states: Any, num_steps: int, target: float
) -> tuple[Any, Array, Array]:
    """`(states, step size, inverse mass [d])` after windows of dual averaging (Hoffman and Gelman 2014, Section 3.2).

    The mass matrix comes from the variance within chains, not between them: those in separate modes then fit
    each its own mode.  Pooling the chains' acceptance rates averages out noise that biases the step size low.
    """
    init, update, final = dual_averaging_adaptation(target)
    length = num_steps // WINDOWS

    def window(carry: tuple, key: Array) -> tuple[tuple, None]:
        states, step_size, _, inverse_mass = carry

        def adapt(carry: tuple, k: Array) -> tuple[tuple, Array]:
            states, average = carry
            states, info = move(k, states, jnp.exp(average.log_step_size), inverse_mass)
            return (states, update(average, info.acceptance_rate.mean())), states.position

        keys = jax.random.split(key, length)
        (states, average), positions = jax.lax.scan(adapt, (states, init(step_size)), keys)
        variance = positions.var(axis=0).mean(axis=0)
        # Shrunk towards the old one, so that a short window or one that rejects everything does no harm.
        seen = (length * variance + 5 * inverse_mass) / (length + 5)
        return (states, final(average), inverse_mass, seen), None

    one = jnp.ones_like(states.position[0])
    carry, _ = jax.lax.scan(window, (states, one[0], one, one), jax.random.split(key, WINDOWS))
    return carry[:3]


def _diagnose(samples: Array) -> tuple[Array, Array]:
    """Effective sample size and R-hat, each `[d]`, of `[num_samples, chains, d]`, chains split in halves."""
    n, chains, d = samples.shape
    if n < 4:
        return jnp.full(d, jnp.nan), jnp.full(d, jnp.nan)
    halves = samples[: n // 2 * 2].reshape(2, n // 2, chains, d).swapaxes(1, 2).reshape(2 * chains, n // 2, d)
    return effective_sample_size(halves), potential_scale_reduction(halves)


class AnnealedImportance(NamedTuple):
    """What `annealed_importance_sampling` returns."""

    log_z: Array  # log Z in nats, a scalar: the log of the mean weight
    standard_error: Array  # of log_z, to first order; NaN with one particle
    log_weights: Array  # [particles], log w of Eq. 4; E[w] = Z exactly
    effective_sample_size: Array  # (sum w)^2 / sum w^2 (Neal 2001, Section 4)
    samples: Array  # [particles, *event], which with these weights stand for exp(-E) / Z
    acceptance_rate: Array  # [n], the particles' mean at each temperature


def annealed_importance_sampling(
    key: Array,
    energy: Energy,
    shape: tuple[int, ...],
    betas: ArrayLike,
    *,
    num_integration_steps: int = 10,
    base: GaussianMixture | None = None,
) -> AnnealedImportance:
    """log Z, the log of the integral of exp(-E), by annealed importance sampling (Eqs. 3 and 4).

    One HMC transition of unit mass at each temperature.  Its step size comes from a pilot run with 64 particles of
    its own, so that the weights stay exactly unbiased; hence E[log_z] <= log Z.

    Args:
      key: a PRNG key.
      energy: as for `mala`.
      shape: `(particles, *event)`.
      betas: inverse temperatures b_0 to b_n, `[n + 1]`, increasing from 0 to 1: `jnp.linspace(0, 1, 1001)` say.
      num_integration_steps: leapfrog steps of a transition.
      base: p_0, a mixture or anything with its `sample` and `log_prob`, as wide as exp(-E); by default N(0, I).

    Raises:
      ValueError: if `betas` do not increase from 0 to 1 (not seen under `jit`), `num_integration_steps < 1`, or
        the energy is not of shape `[batch]`.
    """
    if not isinstance(betas, jax.core.Tracer):
        b = np.asarray(betas)
        if b.ndim != 1 or len(b) < 2 or b[0] != 0 or b[-1] != 1 or np.any(np.diff(b) <= 0):
            raise ValueError(f"betas must be a vector increasing from 0 to 1, got {b}")
    _check_shape(energy, jax.ShapeDtypeStruct(shape, jnp.float32))
    draw = base.sample if base else lambda key, n: jax.random.normal(key, (n, *shape[1:]))
    log_base = _by_row(base.log_prob if base else _standard_normal, shape[1:])
    row_energy = _by_row(energy, shape[1:])
    kernel = _hmc_kernel(num_integration_steps, jitter=0.5)

    def move(k, x, beta, step_size):
        def log_density(row):
            return (1 - beta) * log_base(row) - beta * row_energy(row)

        states = jax.vmap(lambda row: blackjax.hmc.init(row, log_density))(x)
        states, info = _move_all(kernel, k, states, log_density, step_size, jnp.ones_like(x[0]))
        return states.position, info.acceptance_rate.mean()

    def pilot(carry, inputs):
        (x, step_size), (k, beta) = carry, inputs
        x, rate = move(k, x, beta, step_size)
        return (x, step_size * jnp.exp(GAIN * (rate - ANNEALED_ACCEPTANCE))), step_size

    def anneal(carry, inputs):
        (x, log_w), (k, beta, increment, step_size) = carry, inputs
        log_w = log_w + increment * jax.vmap(lambda row: -row_energy(row) - log_base(row))(x)
        x, rate = move(k, x, beta, step_size)
        return (x, log_w), rate

    @jax.jit
    def run(key, betas):
        keys, inner, (n, *_) = jax.random.split(key, 4), betas[1:], shape
        start = draw(keys[0], NUM_PILOTS).reshape(NUM_PILOTS, -1), jnp.ones(())
        _, step_sizes = jax.lax.scan(pilot, start, (jax.random.split(keys[1], len(inner)), inner))
        inputs = jax.random.split(keys[3], len(inner)), inner, jnp.diff(betas), step_sizes
        (x, log_w), rates = jax.lax.scan(anneal, (draw(keys[2], n).reshape(n, -1), jnp.zeros(n)), inputs)
        size = 1 / jnp.sum(jax.nn.softmax(log_w) ** 2)
        # By the delta method: n / size - 1 is the squared coefficient of variation of w.
        error = jnp.sqrt(jnp.maximum(n / size - 1, 0) / (n - 1)) if n > 1 else jnp.full((), jnp.nan)
        return AnnealedImportance(jax.nn.logsumexp(log_w) - math.log(n), error, log_w, size, x.reshape(shape), rates)

    return run(key, jnp.asarray(betas, jnp.float32))


def _standard_normal(x: Array) -> Array:
    return jax.scipy.stats.norm.logpdf(x).sum(axis=range(1, x.ndim))


def _by_row(fn: Energy, event: tuple[int, ...]) -> Callable[[Array], Array]:
    """A function of batches as one of a flat example, `[d]` to a scalar."""
    return lambda row: fn(row.reshape(1, *event))[0]


def _check_shape(energy: Energy, x: Array | jax.ShapeDtypeStruct) -> None:
    shape = jax.eval_shape(energy, x).shape
    if shape != x.shape[:1]:
        raise ValueError(f"energy must map [batch, *event] to [batch]: {x.shape} to {x.shape[:1]}, but gave {shape}")
