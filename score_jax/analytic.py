"""Gaussian mixtures, whose score is known at every time: the oracle of tests, toys and benchmarks.

If  X_0 ~ sum_k w_k N(m_k, C_k),  then under the process  X_t = alpha X_0 + sigma eps

    X_t ~ sum_k w_k N(alpha m_k, alpha^2 C_k + sigma^2 I),                  (1)

    score(x, t) = -sum_k r_k(x) (alpha^2 C_k + sigma^2 I)^-1 (x - alpha m_k),   (2)

with r_k(x) the posterior probability of component k.  The covariances in (1) share the
eigenvectors of C_k at all times, so one eigendecomposition serves every t.  Eigenvectors are not differentiable where
eigenvalues coincide, though (1) and (2) are: derivatives are those of the linear system in (2).

Given a measurement  y = A X_0 + noise_std n  it is a mixture again: with  S_k = A C_k A^T + noise_std^2 I  and the
gain  K_k = C_k A^T S_k^-1,

    X_0 | y ~ sum_k w_k N(y; A m_k, S_k)/p(y) N(m_k + K_k (y - A m_k), (I - K_k A) C_k).        (3)
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

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
        return jax.nn.logsumexp(_components(self, _by_cholesky(self.covariances), x)[0], axis=-1)

    def score(self, x: Array) -> Array:
        """The gradient of the log density, in the shape of `x` (`[..., d]`)."""
        return _mixture_score(self, _by_cholesky(self.covariances), x)

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
        log_weights = _components(seen, _by_cholesky(seen.covariances), y)[0]
        return GaussianMixture(jax.nn.softmax(log_weights), means, covariances)

    def score_fn(self, sde: SDE) -> ScoreFn:
        """The exact score of X_t (Eq. 2): `score_fn(x, t)` with `x` `[batch, d]`, `t` scalar or `[batch]`."""
        solve = _by_eigenvectors(self.covariances)
        return lambda x, t: _mixture_score(self, solve, x, sde.alpha(t), sde.sigma(t))


# `solve(r, alpha, sigma)` is  (alpha^2 C_k + sigma^2 I)^-1 r  for r [..., k, d], and the determinants' logs [..., k].
Solve = Callable[[Array, ArrayLike, ArrayLike], tuple[Array, Array]]


def _by_cholesky(covariances: Array) -> Solve:
    """For alpha = 1 and sigma = 0 alone: differentiable to any order."""
    factor = jnp.linalg.cholesky(covariances)
    log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)), axis=-1)

    def solve(r: Array, alpha: ArrayLike, sigma: ArrayLike) -> tuple[Array, Array]:
        columns = jnp.moveaxis(r.reshape(-1, *r.shape[-2:]), 0, -1)
        solution = jnp.moveaxis(jax.scipy.linalg.cho_solve((factor, True), columns), -1, 0)
        return solution.reshape(r.shape), jnp.broadcast_to(log_det, r.shape[:-1])

    return solve


def _by_eigenvectors(covariances: Array) -> Solve:
    """For every alpha and sigma: differentiable in them and in r to any order, once in the covariances."""
    values, vectors = jnp.linalg.eigh(covariances)
    basis = jax.lax.stop_gradient((values, vectors))

    def solve(r: Array, alpha: ArrayLike, sigma: ArrayLike) -> tuple[Array, Array]:
        log_det = jnp.sum(jnp.log(_variance(values, r, alpha, sigma)), axis=-1)
        return _divide(covariances, basis, r, alpha, sigma), log_det

    return solve


def _variance(values: Array, r: Array, alpha: Any, sigma: Any) -> Array:
    """The eigenvalues of alpha^2 C_k + sigma^2 I, from those of C_k."""
    return alpha**2 * values.reshape((1,) * (r.ndim - 2) + values.shape) + sigma**2


@jax.custom_jvp
def _divide(covariances: Array, basis: tuple[Array, Array], r: Array, alpha: ArrayLike, sigma: ArrayLike) -> Array:
    """(alpha^2 C_k + sigma^2 I)^-1 r, by the eigenvalues and eigenvectors of C_k."""
    along = jnp.einsum("kde,...kd->...ke", basis[1], r) / _variance(basis[0], r, alpha, sigma)
    return jnp.einsum("kde,...ke->...kd", basis[1], along)


@_divide.defjvp
def _divide_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """With M z = r:  M dz = dr - dM z."""
    covariances, basis, _, alpha, sigma = primals
    z = _divide(*primals)

    def residual(covariances: Array, basis: tuple, r: Array, alpha: ArrayLike, sigma: ArrayLike) -> Array:
        symmetric = 0.5 * (covariances + jnp.swapaxes(covariances, -1, -2))
        return r - alpha**2 * jnp.einsum("kde,...ke->...kd", symmetric, z) - sigma**2 * z

    return z, _divide(covariances, basis, jax.jvp(residual, primals, tangents)[1], alpha, sigma)


def _components(
    mixture: GaussianMixture, solve: Solve, x: Array, alpha: ArrayLike = 1.0, sigma: ArrayLike = 0.0
) -> tuple[Array, Array]:
    """Each component's log joint density `[..., k]` and score `[..., k, d]` at noise (alpha, sigma)."""
    lead = (1,) * (x.ndim - 1)
    # `alpha` and `sigma` are scalars or one value an example; both line up with [..., k, d].
    alpha, sigma = (jnp.asarray(a)[..., None, None] if jnp.ndim(a) else a for a in (alpha, sigma))
    centred = x[..., None, :] - alpha * mixture.means.reshape(lead + mixture.means.shape)
    solution, log_det = solve(centred, alpha, sigma)
    log_joint = -0.5 * (jnp.sum(centred * solution, axis=-1) + log_det + x.shape[-1] * math.log(2 * math.pi))
    return log_joint + jnp.log(mixture.weights).reshape((*lead, -1)), -solution


def _mixture_score(
    mixture: GaussianMixture, solve: Solve, x: Array, alpha: ArrayLike = 1.0, sigma: ArrayLike = 0.0
) -> Array:
    """Eq. 2: the components' scores, weighted by their posterior probabilities."""
    log_joint, scores = _components(mixture, solve, x, alpha, sigma)
    return jnp.sum(jax.nn.softmax(log_joint, axis=-1)[..., None] * scores, axis=-2)
