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

An energy maps `[batch, *event]` to `[batch]`, rows independent.  Kernels, dual averaging and diagnostics are
blackjax's.  Every call compiles: call these functions inside `jax.jit` to compile once.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.step_size import dual_averaging_adaptation
from blackjax.diagnostics import ess_bulk, rhat
from jax import Array
from jax.typing import ArrayLike

from score_jax.divergence import check_number
from score_jax.parameterization import from_energy

__all__ = ["AnnealedImportance", "Chains", "annealed_importance_sampling", "hmc", "mala", "nuts"]

Energy = Callable[[Array], Array]
Kernel = Callable[..., tuple[Any, Any]]  # (key, state, log density, step size, inverse mass) -> (state, info)

# Warm-up windows: the mass matrix of each is the variance seen in the one before.
WINDOWS = 4

# The particles that set the step size of annealing, and the acceptance rate that they steer for: the best for HMC in
# many dimensions (Beskos et al. 2013).
NUM_PILOTS, ANNEALED_ACCEPTANCE = 64, 0.65


class Chains(NamedTuple):
    """What `mala`, `hmc` and `nuts` return; the last two are rank-normalised (Vehtari et al. 2021), as ArviZ's."""

    samples: Array  # [num_samples, chains, *event], after warm-up
    acceptance_rate: Array  # [chains], the mean acceptance probability (with NUTS also over the trajectory)
    step_size: Array  # the leapfrog step e, a scalar
    inverse_mass_matrix: Array  # [*event], the diagonal of M^-1
    effective_sample_size: Array  # [*event], independent draws that all chains together are worth (bulk)
    r_hat: Array  # [*event], potential scale reduction of split chains; above 1.01 they have not mixed


def mala(
    key: Array, energy: Energy, x: Array, *, num_samples: int, num_warmup: int = 1000, target_acceptance: float = 0.574
) -> Chains:
    """The Metropolis-adjusted Langevin algorithm (Eq. 2), one gradient a sample.

    All chains share one step size and one diagonal mass matrix, fitted to all of them in warm-up; after it both
    are fixed and the chains independent.

    Args:
      key: a PRNG key.
      energy: E, `[batch, *event]` to `[batch]`, rows independent, differentiable; infinite or NaN where p is 0.
      x: the chains' starts, `[chains, *event]`; spread wide, so that `r_hat` means something.
      num_samples: samples of each chain, at least 4.
      num_warmup: steps of each chain to adapt in and discard, at least 4, rounded down to a multiple of 4.
      target_acceptance: what the step size is adapted to; the default is the best in many dimensions (Roberts and
        Rosenthal 1998).

    Raises:
      ValueError: if there are too few samples or steps or no chain, if the energy is not one number an example, or,
        outside `jit`, if it is not finite at a start.
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
    dynamics and come back to where it began (Neal 2011, Section 3.2).

    Args, and errors, as `mala`, and
      num_integration_steps: leapfrog steps of a trajectory, at least 1.
    """
    kernel = _hmc_kernel(num_integration_steps, jitter=0.5)
    return _run(key, energy, x, kernel, num_samples, num_warmup, target_acceptance)


def nuts(
    key: Array, energy: Energy, x: Array, *, num_samples: int, num_warmup: int = 1000, target_acceptance: float = 0.8
) -> Chains:
    """The no-U-turn sampler, by multinomial choice along the trajectory (Betancourt 2017).

    The chains move in step, so each sample costs as many gradients as the longest trajectory of all, at most 1,023.

    Args, and errors, as `mala`.
    """
    return _run(key, energy, x, blackjax.nuts.build_kernel(), num_samples, num_warmup, target_acceptance)


def _hmc_kernel(num_integration_steps: int, *, jitter: float) -> Kernel:
    check_number("num_integration_steps", num_integration_steps)
    transition = blackjax.hmc.build_kernel()

    def kernel(key, state, log_density, step_size, inverse_mass):
        key_step, key = jax.random.split(key)
        step_size = step_size * jax.random.uniform(key_step, minval=1 - jitter, maxval=1 + jitter)
        return transition(key, state, log_density, step_size, inverse_mass, num_integration_steps)

    return kernel


def _run(
    key: Array, energy: Energy, x: Array, kernel: Kernel, num_samples: int, num_warmup: int, target: float
) -> Chains:
    """Warm-up and sampling, the same for every kernel."""
    check_number("num_samples", num_samples, least=4)
    check_number("num_warmup", num_warmup, least=WINDOWS)
    x = jnp.asarray(x, float)
    check_number("the number of chains", len(x))
    jax.eval_shape(from_energy(energy), x)

    def log_density(row: Array) -> Array:
        return -energy(row[None])[0]

    # The states of NUTS are those of HMC.
    states = jax.jit(jax.vmap(lambda row: blackjax.hmc.init(row, log_density)))(x)
    finite = jnp.isfinite(states.logdensity)
    if not isinstance(finite, jax.core.Tracer) and not finite.all():
        bad = np.flatnonzero(~finite).tolist()
        raise ValueError(f"the energy is not finite at the start of chains {bad}: start them where exp(-E) > 0")

    # One split for every step of every chain, so that no key serves twice.
    keys = jax.random.split(key, (num_warmup + num_samples, len(x)))
    move = jax.jit(jax.vmap(lambda k, state, *a: kernel(k, state, log_density, *a), in_axes=(0, 0, None, None)))
    states, step_size, inverse_mass = _warm_up(keys[:num_warmup], move, states, target)

    def step(states: Any, k: Array) -> tuple[Any, tuple[Array, Array]]:
        states, info = move(k, states, step_size, inverse_mass)
        return states, (states.position, info.acceptance_rate)

    _, (samples, rates) = jax.lax.scan(step, states, keys[num_warmup:])
    per_value = inverse_mass, *_diagnose(samples.reshape(num_samples, len(x), -1))
    return Chains(samples, rates.mean(axis=0), step_size, *(value.reshape(x.shape[1:]) for value in per_value))


def _warm_up(keys: Array, move: Kernel, states: Any, target: float) -> tuple[Any, Array, Array]:
    """`(states, step size, inverse mass [d])` after windows of dual averaging (Hoffman and Gelman 2014, Section 3.2).

    What is averaged is the mean acceptance rate of all chains.  The mass matrix comes from the variance within chains,
    not between them: those in separate modes then fit each its own mode.
    """
    init, update, final = dual_averaging_adaptation(target)
    length, chains = len(keys) // WINDOWS, len(states.position)

    def window(carry: tuple, keys: Array) -> tuple[tuple, None]:
        states, step_size, _, inverse_mass = carry

        def step(carry: tuple, k: Array) -> tuple[tuple, Array]:
            states, average = carry
            states, info = move(k, states, jnp.exp(average.log_step_size), inverse_mass)
            return (states, update(average, info.acceptance_rate.mean())), states.position

        # Short windows do not come back from around ten times the last step size, where blackjax starts the search.
        average = init(step_size)._replace(mu=jnp.log(step_size))
        (states, average), positions = jax.lax.scan(step, (states, average), keys)
        variance = positions.reshape(length, chains, -1).var(axis=0).mean(axis=0)
        # Shrunk towards the old one, so that a short window or one that rejects everything does no harm.
        renewed = (length * variance + 5 * inverse_mass) / (length + 5)
        return (states, final(average), inverse_mass, renewed), None

    one = jnp.ones_like(states.position[0]).ravel()
    windows = keys[: length * WINDOWS].reshape(WINDOWS, length, *keys.shape[1:])
    carry, _ = jax.lax.scan(window, (states, one[0], one, one), windows)
    return carry[:3]  # The step size goes with the mass matrix of its window.


@jax.jit
def _diagnose(samples: Array) -> list[Array]:
    """Effective sample size and R-hat, `[d]`, of `[num_samples, chains, d]`; compiled once for all energies."""
    return [jax.vmap(lambda s, fn=fn: fn(s.T), in_axes=2)(samples) for fn in (ess_bulk, rhat)]


class AnnealedImportance(NamedTuple):
    """What `annealed_importance_sampling` returns."""

    log_z: Array  # log Z in nats, a scalar: the log of the mean weight
    standard_error: Array  # of log_z, to first order; NaN with one particle
    log_weights: Array  # [particles], log w of Eq. 4; E[w] = Z exactly
    samples: Array  # [particles, *event], which with these weights stand for exp(-E) / Z
    acceptance_rate: Array  # [n], the particles' mean at each temperature


def annealed_importance_sampling(
    key: Array,
    energy: Energy,
    shape: tuple[int, ...],
    betas: ArrayLike,
    *,
    scale: float = 1.0,
    num_integration_steps: int = 10,
) -> AnnealedImportance:
    """log Z, the log of the integral of exp(-E), by annealed importance sampling (Eqs. 3 and 4).

    One HMC transition of unit mass at each temperature.  Its step size comes from 64 more particles that carry no
    weight, so that the weights stay exactly unbiased; hence E[log_z] <= log Z.

    Args:
      key: a PRNG key.
      energy: E as for `mala`, but infinite, not NaN, where p is 0.
      shape: `(particles, *event)`.
      betas: inverse temperatures b_0 to b_n, `[n + 1]`, increasing from 0 to 1: `jnp.linspace(0, 1, 1001)` say.
      scale: p_0 is N(0, scale^2 I); better too wide than too narrow.
      num_integration_steps: leapfrog steps of a transition, at least 1.

    Raises:
      ValueError: if there is no particle, if the energy is not one number an example, if `num_integration_steps < 1`,
        or, outside `jit`, if `betas` do not increase from 0 to 1.
    """
    if not isinstance(betas, jax.core.Tracer):
        b = np.asarray(betas)
        if b.ndim != 1 or len(b) < 2 or b[0] != 0 or b[-1] != 1 or np.any(np.diff(b) <= 0):
            raise ValueError(f"betas must be a vector increasing from 0 to 1, got {b}")
    check_number("the number of particles", shape[0])
    jax.eval_shape(from_energy(energy), jax.ShapeDtypeStruct(shape, jnp.float32))
    kernel = _hmc_kernel(num_integration_steps, jitter=0.5)

    def log_base(row: Array) -> Array:
        return jax.scipy.stats.norm.logpdf(row, scale=scale).sum()

    def log_ratio(row: Array) -> Array:
        return -energy(row[None])[0] - log_base(row)

    def anneal(carry: tuple, inputs: tuple) -> tuple[tuple, Array]:
        (x, log_w, step_size), (k, beta, increment) = carry, inputs

        def log_density(row: Array) -> Array:
            return log_base(row) + beta * log_ratio(row)

        def move(k: Array, row: Array) -> tuple[Array, Array]:
            state = blackjax.hmc.init(row, log_density)
            state, info = kernel(k, state, log_density, step_size, jnp.ones(row.size))
            return state.position, info.acceptance_rate

        log_w = log_w + increment * jax.vmap(log_ratio)(x)
        x, rates = jax.vmap(move)(jax.random.split(k, len(x)), x)
        # A particle's own acceptance must not set its next step: that would bias its weight.
        step_size = step_size * jnp.exp((rates[:NUM_PILOTS].mean() - ANNEALED_ACCEPTANCE) / 2)
        return (x, log_w, step_size), rates[NUM_PILOTS:].mean()

    betas, (n, *event) = jnp.asarray(betas, jnp.float32), shape
    key_base, key = jax.random.split(key)
    x = scale * jax.random.normal(key_base, (NUM_PILOTS + n, *event))
    inputs = jax.random.split(key, len(betas) - 1), betas[1:], jnp.diff(betas)
    (x, log_w, _), rates = jax.lax.scan(anneal, (x, jnp.zeros(len(x)), jnp.asarray(scale, x.dtype)), inputs)
    x, log_w = x[NUM_PILOTS:], log_w[NUM_PILOTS:]
    # By the delta method: the standard error of the mean of w, over that mean.
    error = jnp.std(n * jax.nn.softmax(log_w), ddof=1) / math.sqrt(n)
    return AnnealedImportance(jax.nn.logsumexp(log_w) - math.log(n), error, log_w, x, rates)
