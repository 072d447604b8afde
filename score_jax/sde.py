"""Forward processes: how data turns into noise, and the two reverse equations.

A process is a linear SDE (Song et al. 2021, "Score-Based Generative Modeling
through Stochastic Differential Equations", Eq. 5)

    dX = f(t) X dt + g(t) dW,    t in [t_min, t_max],                       (1)

whose law given the data is Gaussian at every time (Eq. 29 there):

    X_t | X_0 ~ N(alpha_t X_0, sigma_t^2 I).                                (2)

A subclass writes log alpha_t and log sigma_t and nothing else.  With the
log signal-to-noise ratio  lambda_t = 2 (log alpha_t - log sigma_t)  the
coefficients of (1) follow by differentiation (Kingma et al. 2021, Eq. 9)

    f(t)   = (log alpha_t)',                                                (3)
    g(t)^2 = -sigma_t^2 lambda_t'.                                          (4)

Run backwards in time, (1) becomes the reverse SDE (Anderson 1982) and, with the
same marginals, the probability-flow ODE (Song et al. 2021, Eqs. 6 and 13):

    dX = [f X - g^2 score(X, t)] dt + g dW,                                 (5)
    dX = [f X - g^2/2 score(X, t)] dt.                                      (6)
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from score_jax.batches import as_batch, as_time, call_score, expand, square
from score_jax.batches import dot as dot

ScoreFn = Callable[[Array, Array], Array]

__all__ = [
    "DDPM",
    "EDM",
    "SDE",
    "VE",
    "VP",
    "Cosine",
    "OrnsteinUhlenbeck",
    "RectifiedFlow",
    "ScoreFn",
    "SubVP",
    "expand",
    "perturb",
    "prior_log_prob",
    "probability_flow_drift",
    "reverse_drift",
    "sample_prior",
]


def _is_number(value) -> bool:
    """Whether it is known now: not so a traced value, nor one of equinox's masks of booleans."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_order(name: str, *, equal: bool = False, **values) -> None:
    """Raise unless the values are positive and increase, or with `equal` do not decrease; traced values pass."""
    known = {k: v for k, v in values.items() if _is_number(v)}
    ordered = sorted(known.values() if equal else set(known.values()))
    if any(v <= 0 for v in known.values()) or list(known.values()) != ordered:
        wanted = "0 < " + (" <= " if equal else " < ").join(values)
        raise ValueError(f"{name} needs {wanted}, got " + ", ".join(f"{k}={v}" for k, v in known.items()))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SDE:
    """A forward process: a frozen dataclass whose fields are pytree leaves.

    Attributes:
      t_min: the smallest time, where training and sampling end.
      t_max: the largest time, where `X_t` is the prior.
    """

    t_min: float = dataclasses.field(default=1e-5, kw_only=True)
    t_max: float = dataclasses.field(default=1.0, kw_only=True)

    def __post_init__(self):
        _check_order(type(self).__name__, t_min=self.t_min, t_max=self.t_max)

    def log_alpha(self, t: ArrayLike) -> Array:
        """log alpha_t, in the shape of `t`."""
        raise NotImplementedError(f"{type(self).__name__} must define log_alpha")

    def log_sigma(self, t: ArrayLike) -> Array:
        """log sigma_t, in the shape of `t`."""
        raise NotImplementedError(f"{type(self).__name__} must define log_sigma")

    def alpha(self, t: ArrayLike) -> Array:
        """The scale of the signal in Eq. 2, in the shape of `t`."""
        return jnp.exp(self.log_alpha(as_time(t)))

    def sigma(self, t: ArrayLike) -> Array:
        """The standard deviation of the noise in Eq. 2, in the shape of `t`."""
        return jnp.exp(self.log_sigma(as_time(t)))

    def log_snr(self, t: ArrayLike) -> Array:
        """lambda_t = log(alpha_t^2 / sigma_t^2), strictly decreasing, in the shape of `t`."""
        t = as_time(t)
        return 2 * (self.log_alpha(t) - self.log_sigma(t))

    def drift(self, x: Array, t: ArrayLike) -> Array:
        """f(t) x of Eq. 3, in the shape of `x` (`[batch, *event]`)."""
        return expand(_rate(self.log_alpha, t), x) * x

    def diffusion(self, t: ArrayLike) -> Array:
        """g(t) of Eq. 4, in the shape of `t`."""
        return self.sigma(t) * jnp.sqrt(-_rate(self.log_snr, t))


def _rate(fn: Callable[[Array], Array], t: ArrayLike) -> Array:
    """The time derivative of `fn`, in the shape of `t`."""
    t = as_time(t)
    return jax.jvp(fn, (t,), (jnp.ones_like(t),))[1]


class _VariancePreserving(SDE):
    """alpha_t^2 + sigma_t^2 = 1: a subclass writes log alpha_t."""

    def log_sigma(self, t: ArrayLike) -> Array:
        # 1 - exp(2 log alpha) loses every digit in float32 near t_min; expm1 keeps them.
        return 0.5 * jnp.log(-jnp.expm1(2 * self.log_alpha(t)))

    def diffusion(self, t: ArrayLike) -> Array:
        # Eq. 4 is g^2 = -2 f here, and so it has no factors 0 and infinity at t = 0.
        return jnp.sqrt(-2 * _rate(self.log_alpha, t))


class _Vanishing(SDE):
    """alpha is zero at t = 1, where the coefficients are infinite."""

    def __post_init__(self):
        super().__post_init__()
        if _is_number(self.t_max) and self.t_max >= 1:
            raise ValueError(f"{type(self).__name__} needs t_max below 1, where no signal is left, got {self.t_max}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VP(_VariancePreserving):
    """Variance preserving: alpha_t^2 + sigma_t^2 = 1 (Song et al. 2021, Eqs. 11 and 33).

    f = -beta(t)/2 and g^2 = beta(t), with beta(t) = beta_min + t (beta_max - beta_min).
    The continuous limit of DDPM (Ho et al. 2020).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        super().__post_init__()
        _check_order(type(self).__name__, equal=True, beta_min=self.beta_min, beta_max=self.beta_max)

    def log_alpha(self, t: ArrayLike) -> Array:
        t = as_time(t)
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SubVP(VP):
    """Sub-variance preserving: VP's alpha_t, and sigma_t = 1 - alpha_t^2 (Song et al. 2021, Eq. 14).

    f = -beta(t)/2 and g^2 = beta(t) (1 - alpha_t^4): always less noise than VP.
    """

    def log_sigma(self, t: ArrayLike) -> Array:
        return jnp.log(-jnp.expm1(2 * self.log_alpha(t)))

    def diffusion(self, t: ArrayLike) -> Array:
        return super().diffusion(t) * jnp.sqrt(-jnp.expm1(4 * self.log_alpha(t)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VE(SDE):
    """Variance exploding: alpha_t = 1, sigma_t = sigma_min (sigma_max/sigma_min)^t (Song et al. 2021, Eq. 31).

    f = 0 and g^2 = 2 sigma_t^2 log(sigma_max/sigma_min).  The continuous limit of
    NCSN's ladder of noise levels.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self):
        super().__post_init__()
        _check_order(type(self).__name__, sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    def log_alpha(self, t: ArrayLike) -> Array:
        return jnp.zeros_like(as_time(t))

    def log_sigma(self, t: ArrayLike) -> Array:
        t = as_time(t)
        return jnp.log(self.sigma_min) + t * jnp.log(self.sigma_max / self.sigma_min)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cosine(_Vanishing, _VariancePreserving):
    """Variance preserving with alpha_t ~ cos(pi/2 (t + s)/(1 + s)), one at t = 0 (Nichol & Dhariwal 2021, Eq. 17).

    alpha reaches zero at t = 1; the process ends a little before (Lu et al. 2022, Appendix B).
    """

    t_max: float = dataclasses.field(default=0.9946, kw_only=True)
    offset: float = 0.008

    def log_alpha(self, t: ArrayLike) -> Array:
        # cos(a + b)/cos(a) = cos(b) - sin(b) tan(a), free of the cancellation of two logarithms near t = 0.
        a, b = (0.5 * math.pi / (1 + self.offset) * angle for angle in (self.offset, as_time(t)))
        return jnp.log1p(-2 * jnp.sin(b / 2) ** 2 - jnp.sin(b) * jnp.tan(a))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EDM(SDE):
    """alpha_t = 1, sigma_t = t: the noise level is the time (Karras et al. 2022, Table 1).  f = 0 and g^2 = 2 t."""

    t_min: float = dataclasses.field(default=0.002, kw_only=True)
    t_max: float = dataclasses.field(default=80.0, kw_only=True)

    def log_alpha(self, t: ArrayLike) -> Array:
        return jnp.zeros_like(as_time(t))

    def log_sigma(self, t: ArrayLike) -> Array:
        return jnp.log(as_time(t))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RectifiedFlow(_Vanishing):
    """Linear interpolation: alpha_t = 1 - t, sigma_t = t (Liu et al. 2023; Lipman et al. 2023, Eq. 23, time reversed).

    f = -1/(1 - t) and g^2 = 2 t/(1 - t) grow without bound at t = 1; the process ends a little before.
    """

    t_max: float = dataclasses.field(default=0.999, kw_only=True)

    def log_alpha(self, t: ArrayLike) -> Array:
        return jnp.log1p(-as_time(t))

    def log_sigma(self, t: ArrayLike) -> Array:
        return jnp.log(as_time(t))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OrnsteinUhlenbeck(_VariancePreserving):
    """dX = -X dt + sqrt(2) dW: alpha_t = exp(-t), sigma_t^2 = 1 - exp(-2 t)."""

    t_max: float = dataclasses.field(default=5.0, kw_only=True)

    def log_alpha(self, t: ArrayLike) -> Array:
        return -as_time(t)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DDPM(_VariancePreserving):
    """The chain x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) z, k = 1 ... N, at times t = k/N (Ho et al. 2020, Eq. 2).

    alpha^2 is the product of 1 - beta_j up to k; between the times of the chain log alpha is linear, which makes the
    chain the exact law of an SDE of piecewise constant f.

    Attributes:
      t_min: the time of the chain's first step, 1/N: to be given with a table whose N is not 1,000.
      betas: the table, `[N]`, between 0 and 1; by default the published one, 1,000 from 0.0001 to 0.02.

    Raises:
      ValueError: if a beta is not between 0 and 1.
    """

    t_min: float = dataclasses.field(default=1e-3, kw_only=True)
    betas: ArrayLike = dataclasses.field(default_factory=lambda: np.linspace(1e-4, 0.02, 1000, dtype=np.float32))

    def __post_init__(self):
        super().__post_init__()
        # Arrays stand for gradients and the like, too; beside a time that is a number they are a table.
        known = isinstance(self.betas, np.ndarray | Array) and not isinstance(self.betas, jax.core.Tracer)
        if _is_number(self.t_min) and known and not np.all((np.asarray(self.betas) > 0) & (np.asarray(self.betas) < 1)):
            raise ValueError(f"{type(self).__name__} needs betas between 0 and 1, got {self.betas}")

    def log_alpha(self, t: ArrayLike) -> Array:
        table = jnp.concatenate([jnp.zeros(1), 0.5 * jnp.cumsum(jnp.log1p(-jnp.asarray(self.betas)))])
        return jnp.interp(as_time(t), jnp.linspace(0.0, 1.0, len(table)), table)


def perturb(sde: SDE, x0: Array, noise: Array, t: ArrayLike) -> Array:
    """X_t = alpha_t x_0 + sigma_t noise (Eq. 2); `x0` and `noise` are `[batch, *event]`."""
    return expand(sde.alpha(t), x0) * x0 + expand(sde.sigma(t), x0) * noise


def sample_prior(key: Array, sde: SDE, shape: tuple[int, ...]) -> Array:
    """Draw from N(0, sigma_{t_max}^2 I), the law of X_{t_max} where the signal has vanished.

    Args:
      key: a PRNG key.
      sde: the process.
      shape: `[batch, *event]`.
    """
    return sde.sigma(sde.t_max) * jax.random.normal(key, shape)


def prior_log_prob(sde: SDE, x: Array) -> Array:
    """Log density of the prior N(0, sigma_{t_max}^2 I), in nats: `[batch, *event]` to `[batch]`."""
    x = as_batch(x)
    size = math.prod(x.shape[1:])
    log_sigma = sde.log_sigma(sde.t_max)
    return -0.5 * square(x * jnp.exp(-log_sigma)) - size * (log_sigma + 0.5 * math.log(2 * math.pi))


def reverse_drift(sde: SDE, score_fn: ScoreFn, x: Array, t: ArrayLike) -> Array:
    """f x - g^2 score, the drift of the reverse SDE (Eq. 5), in the shape of `x`."""
    return sde.drift(x, t) - expand(sde.diffusion(t) ** 2, x) * call_score(score_fn, x, t)


def probability_flow_drift(sde: SDE, score_fn: ScoreFn, x: Array, t: ArrayLike) -> Array:
    """f x - g^2/2 score, the drift of the probability-flow ODE (Eq. 6), in the shape of `x`."""
    return sde.drift(x, t) - expand(0.5 * sde.diffusion(t) ** 2, x) * call_score(score_fn, x, t)
