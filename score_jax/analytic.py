"""Gaussian mixtures, whose score is known at every time: the oracle of tests, toys and benchmarks.

If  X_0 ~ sum_k w_k N(m_k, C_k),  then under the process  X_t = alpha X_0 + sigma eps

    X_t ~ sum_k w_k N(alpha m_k, alpha^2 C_k + sigma^2 I),                  (1)

    score(x, t) = -sum_k r_k(x) (alpha^2 C_k + sigma^2 I)^-1 (x - alpha m_k),   (2)

with r_k(x) the posterior probability of component k.  The covariances in (1) share the
eigenvectors of C_k at all times, so one eigendecomposition serves every t.

Given a measurement  y = A X_0 + noise_std n  it is a mixture again: with  S_k = A C_k A^T + noise_std^2 I  and the
gain  K_k = C_k A^T S_k^-1,

    X_0 | y ~ sum_k w_k N(y; A m_k, S_k)/p(y) N(m_k + K_k (y - A m_k), (I - K_k A) C_k).        (3)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from score_jax.sde import SDE, ScoreFn

__all__ = ["GaussianMixture"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianMixture:
    """A mixture of k Gaussians in d dimensions.

    Attributes:
      weights: `[k]`, positive, summing to one.
      means: `[k, d]`.
      covariances: `[k, d, d]`, symmetric positive definite.

    Raises:
      ValueError: if the shapes do not fit together.
    """

    weights: Array
    means: Array
    covariances: Array

    def __post_init__(self):
        leaves = self.weights, self.means, self.covariances
        if not all(isinstance(leaf, Array | np.ndarray | list | tuple) for leaf in leaves):
            return  # Inside a tree transformation a leaf can be anything.
        for field, leaf in zip(dataclasses.fields(self), leaves, strict=True):
            object.__setattr__(self, field.name, jnp.asarray(leaf))
        shapes = self.weights.shape, self.means.shape, self.covariances.shape
        # A leading axis more is a batch of mixtures, as vmap makes them.
        if shapes[1][:-1] != shapes[0] or shapes[2] != shapes[1] + shapes[1][-1:]:
            raise ValueError(
                "a mixture needs weights [k], means [k, d] and covariances [k, d, d], "
                f"got shapes {shapes[0]}, {shapes[1]} and {shapes[2]}"
            )

    def sample(self, key: Array, n: int) -> Array:
        """Draw `[n, d]` independent points."""
        key_component, key_noise = jax.random.split(key)
        component = jax.random.categorical(key_component, jnp.log(self.weights), shape=(n,))
        values, vectors = jnp.linalg.eigh(self.covariances)
        z = jax.random.normal(key_noise, (n, self.means.shape[1]))
        scaled = jnp.sqrt(values)[component] * z
        return self.means[component] + jnp.einsum("nde,ne->nd", vectors[component], scaled)

    def log_prob(self, x: Array) -> Array:
        """Log density in nats: `[..., d]` to `[...]`."""
        return jax.nn.logsumexp(_components(self, self._eigen(), x, 1.0, 0.0)[0], axis=-1)

    def score(self, x: Array) -> Array:
        """The gradient of the log density, in the shape of `x` (`[..., d]`)."""
        return _mixture_score(self, self._eigen(), x, 1.0, 0.0)

    def marginal(self, sde: SDE, t: ArrayLike) -> "GaussianMixture":
        """The law of X_t (Eq. 1) at a scalar time, a mixture again."""
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        noise = jnp.broadcast_to(sigma**2 * jnp.eye(self.means.shape[-1]), self.covariances.shape)
        return GaussianMixture(self.weights, alpha * self.means, alpha**2 * self.covariances + noise)

    def measurement(self, A: Array, noise_std: float | Array) -> "GaussianMixture":
        """The law of y = A X_0 + noise_std n, for `A` `[m, d]`."""
        spread = jnp.einsum("md,kde,ne->kmn", A, self.covariances, A)
        noise = jnp.broadcast_to(noise_std**2 * jnp.eye(len(A)), spread.shape)
        return GaussianMixture(self.weights, self.means @ A.T, spread + noise)

    def posterior(self, A: Array, y: Array, noise_std: float | Array) -> "GaussianMixture":
        """The law of X_0 given y = A X_0 + noise_std n (Eq. 3), a mixture again.

        Args:
          A: `[m, d]`.
          y: `[m]`; for several measurements, `vmap`.
          noise_std: positive.

        Raises:
          ValueError: if the shapes do not fit.
        """
        if A.shape != y.shape + self.means.shape[-1:]:
            raise ValueError(f"A must have shape {y.shape + self.means.shape[-1:]}, [m, d], but has {A.shape}")
        seen = self.measurement(A, noise_std)
        cross = jnp.einsum("kde,me->kdm", self.covariances, A)
        gain = jnp.swapaxes(jnp.linalg.solve(seen.covariances, jnp.swapaxes(cross, 1, 2)), 1, 2)
        means = self.means + jnp.einsum("kdm,km->kd", gain, y[None] - seen.means)
        # (I - K A) C, written as a sum of squares, which rounding leaves positive.
        rest = jnp.eye(A.shape[1])[None] - jnp.einsum("kdm,me->kde", gain, A)
        covariances = jnp.einsum("kde,kef,kgf->kdg", rest, self.covariances, rest)
        covariances = covariances + noise_std**2 * jnp.einsum("kdm,kem->kde", gain, gain)
        log_weights = _components(seen, seen._eigen(), y, 1.0, 0.0)[0]
        return GaussianMixture(jax.nn.softmax(log_weights), means, covariances)

    def score_fn(self, sde: SDE) -> ScoreFn:
        """The exact score of X_t (Eq. 2): `score_fn(x, t)` with `x` `[batch, d]`, `t` scalar or `[batch]`."""
        eigen = self._eigen()
        return lambda x, t: _mixture_score(self, eigen, x, sde.alpha(t), sde.sigma(t))

    def _eigen(self) -> tuple[Array, Array]:
        """Eigenvalues `[k, d]` and eigenvectors `[k, d, d]` (in columns) of the covariances."""
        return tuple(jnp.linalg.eigh(self.covariances))


def _components(
    mixture: GaussianMixture,
    eigen: tuple[Array, Array],
    x: Array,
    alpha: ArrayLike,
    sigma: ArrayLike,
) -> tuple[Array, Array]:
    """Each component's log joint density `[..., k]` and score `[..., k, d]` at noise (alpha, sigma)."""
    values, vectors = eigen
    lead = (1,) * (x.ndim - 1)
    # `alpha` and `sigma` are scalars or one value an example; both line up with [..., k, d].
    alpha, sigma = (jnp.asarray(a)[..., None, None] if jnp.ndim(a) else a for a in (alpha, sigma))
    centred = x[..., None, :] - alpha * mixture.means.reshape(lead + mixture.means.shape)
    variance = alpha**2 * values.reshape(lead + values.shape) + sigma**2
    along = jnp.einsum("kde,...kd->...ke", vectors, centred)
    log_joint = -0.5 * jnp.sum(along**2 / variance + jnp.log(2 * math.pi * variance), axis=-1)
    log_joint = log_joint + jnp.log(mixture.weights).reshape((*lead, -1))
    return log_joint, -jnp.einsum("kde,...ke->...kd", vectors, along / variance)


def _mixture_score(
    mixture: GaussianMixture,
    eigen: tuple[Array, Array],
    x: Array,
    alpha: ArrayLike,
    sigma: ArrayLike,
) -> Array:
    """Eq. 2: the components' scores, weighted by their posterior probabilities."""
    log_joint, scores = _components(mixture, eigen, x, alpha, sigma)
    return jnp.sum(jax.nn.softmax(log_joint, axis=-1)[..., None] * scores, axis=-2)
