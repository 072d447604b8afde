"""From what a network predicts to the score, and from the score to the clean data.

With x_t = alpha x_0 + sigma eps (time subscripts dropped), the score of the marginal
is an expectation over the posterior (Vincent 2011; Efron 2011):

    score(x_t, t) = -E[eps | x_t] / sigma                                   (1)
                  = (alpha E[x_0 | x_t] - x_t) / sigma^2.                   (2)

Solving (2) for the posterior mean is Tweedie's formula

    E[x_0 | x_t] = (x_t + sigma^2 score(x_t, t)) / alpha.                   (3)

The velocity of Salimans & Ho (2022, Eq. 11), v = alpha eps - sigma x_0, together with x_t
determines eps on any process, not only where alpha^2 + sigma^2 = 1:

    eps = (sigma x_t + alpha v) / (alpha^2 + sigma^2).                      (4)

The derivative of (3) is the posterior covariance (second-order Tweedie, with J = d score / d x_t):

    Cov[x_0 | x_t] = sigma^2/alpha dE[x_0 | x_t]/dx_t = sigma^2/alpha^2 (I + sigma^2 J).       (5)

Flow matching predicts the mean velocity of the paths x_t = alpha x_0 + sigma eps through a point, which is the drift of
the probability flow (Lipman et al. 2023, Theorem 1; Liu et al. 2023; `sde`, Eq. 6):

    u(x_t, t) = E[alpha' x_0 + sigma' eps | x_t] = f x_t - g^2/2 score(x_t, t).     (6)

Each adapter takes `net(x, t)` and returns a `ScoreFn`; the net has t as the score has it, a scalar from samplers and
`[batch]` from losses, and the networks of `networks` take both.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from score_jax.batches import call_score, expand
from score_jax.sde import SDE, ScoreFn

__all__ = [
    "from_denoiser",
    "from_energy",
    "from_flow",
    "from_noise",
    "from_score",
    "from_velocity",
    "preconditioned",
    "tweedie",
    "tweedie_covariance",
]

Net = Callable[[Array, Array], Array]


def _call(net: Net, x: Array, t: Array) -> Array:
    return call_score(net, x, t, "what a network predicts")


def from_noise(sde: SDE, net: Net) -> ScoreFn:
    """The score of a network that predicts the noise eps (Eq. 1)."""
    return lambda x, t: -_call(net, x, t) / expand(sde.sigma(t), x)


def from_score(sde: SDE, net: Net) -> ScoreFn:
    """The score of a network that predicts it, as NCSN does."""
    return net


def from_denoiser(sde: SDE, net: Net) -> ScoreFn:
    """The score of a network that predicts the clean data x_0 (Eq. 2)."""

    def score_fn(x: Array, t: Array) -> Array:
        return (expand(sde.alpha(t), x) * _call(net, x, t) - x) / expand(sde.sigma(t) ** 2, x)

    return score_fn


def from_velocity(sde: SDE, net: Net) -> ScoreFn:
    """The score of a network that predicts v = alpha eps - sigma x_0 (Eq. 4); flow matching's u is `from_flow`'s."""

    def score_fn(x: Array, t: Array) -> Array:
        alpha, sigma = expand(sde.alpha(t), x), expand(sde.sigma(t), x)
        return -(x + alpha / sigma * _call(net, x, t)) / (alpha**2 + sigma**2)

    return score_fn


def from_flow(sde: SDE, net: Net) -> ScoreFn:
    """The score of a network that predicts u = E[dx_t/dt | x_t], as flow matching does (Eq. 6).

    On `RectifiedFlow` u is E[eps - x_0 | x_t].  Time runs from data to noise: a network whose time s runs from noise to
    data is `lambda x, t: -net(x, 1 - t)`.  Salimans & Ho's v is `from_velocity`'s.

    Training needs no loss of its own: `denoising_score_matching` is a regression of u, the published one,
    1/2 |u - alpha' x_0 - sigma' eps|^2, with `weight=lambda sde, t: sde.diffusion(t) ** 4 / 4`.
    """

    def score_fn(x: Array, t: Array) -> Array:
        return (sde.drift(x, t) - _call(net, x, t)) / expand(0.5 * sde.diffusion(t) ** 2, x)

    return score_fn


def preconditioned(sde: SDE, net: Net, *, sigma_data: float = 0.5) -> ScoreFn:
    """The score of a network F inside EDM's preconditioning (Karras et al. 2022, Eq. 7 and Table 1).

    With y = x / alpha and s = sigma / alpha, the noise level of the rescaled process,

        D(y, s) = c_skip y + c_out F(c_in y, log(s) / 4),

    where c_skip = sigma_data^2 / (s^2 + sigma_data^2), c_out = s sigma_data c_in and
    c_in = 1 / sqrt(s^2 + sigma_data^2): input and target have unit variance at every level.

    Args:
      sde: the process.
      net: `net(x, cond)`; note that it receives `log(s) / 4`, not the time.
      sigma_data: the standard deviation of the data.
    """

    def denoiser(x: Array, t: Array) -> Array:
        level = jnp.exp(-0.5 * sde.log_snr(t))
        c_in = 1 / jnp.sqrt(level**2 + sigma_data**2)
        y = x / expand(sde.alpha(t), x)
        skip = expand((sigma_data * c_in) ** 2, x) * y
        return skip + expand(level * sigma_data * c_in, x) * _call(net, expand(c_in, x) * y, jnp.log(level) / 4)

    return from_denoiser(sde, denoiser)


def from_energy(energy: Callable[..., Array]) -> Callable[..., Array]:
    """The score of an unnormalised model p(x) ~ exp(-E(x)): minus the gradient of the energy.

    Args:
      energy: `energy(x)` or `energy(x, t)`, `[batch, *event]` to `[batch]`, rows independent.

    Returns:
      The score with the same arguments: `fn(x)` or a `ScoreFn`.

    Raises:
      ValueError: when called, if the energy is not one number an example.
    """

    def score_fn(x: Array, *t: Any) -> Array:
        def total(x: Array) -> Array:
            value = energy(x, *t)
            if value.shape != x.shape[:1]:
                raise ValueError(f"an energy must be one number an example, {x.shape[:1]}, but has {value.shape}")
            return jnp.sum(value)

        return -jax.grad(total)(x)

    return score_fn


def tweedie(sde: SDE, score_fn: ScoreFn, x: Array, t: ArrayLike) -> Array:
    """The posterior mean E[x_0 | x_t] (Eq. 3), in the shape of `x` (`[batch, *event]`)."""
    return (x + expand(sde.sigma(t) ** 2, x) * call_score(score_fn, x, t)) / expand(sde.alpha(t), x)


def tweedie_covariance(sde: SDE, score_fn: ScoreFn, x: Array, t: ArrayLike, v: Array) -> tuple[Array, Array]:
    """The posterior mean (Eq. 3) and the posterior covariance times a vector (Eq. 5), by one `jvp`.

    Args:
      sde: the process.
      score_fn: `score_fn(x, t)`, rows independent.
      x: `[batch, *event]`.
      t: scalar or `[batch]`.
      v: the vectors, in the shape of `x`.

    Returns:
      `(E[x_0 | x_t], Cov[x_0 | x_t] v)`, both in the shape of `x`.
    """
    mean, tangent = jax.jvp(lambda x: tweedie(sde, score_fn, x, t), (x,), (v,))
    return mean, expand(sde.sigma(t) ** 2 / sde.alpha(t), x) * tangent
