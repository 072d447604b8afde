"""Langevin dynamics: sampling from a law whose score is known, without changing the time.

    x <- x + e score(x) + sqrt(2 e) z,    z ~ N(0, I)                       (1)

leaves the law of the score invariant as the step size e goes to 0.  As a corrector it
repairs, at a fixed time, the law that a predictor's discretisation has bent (Song et al.
2021, Section 4.2).
"""

import jax
import jax.numpy as jnp
from jax import Array

from score_jax.samplers.base import Sampler, no_state
from score_jax.sde import SDE, ScoreFn, expand

__all__ = ["langevin_corrector"]


def langevin_corrector(sde: SDE, score_fn: ScoreFn, *, snr: float = 0.16, num_steps: int = 1) -> Sampler:
    """Langevin steps at time s, sized by a signal-to-noise ratio (Song et al. 2021, Algorithms 4 and 5).

    e = 2 (snr |z| / |score|)^2 in Eq. 1, the norms taken over each example by itself, so that a
    sample does not depend on its batch-mates.  Use it after a predictor, in `chain`.

    For many dimensions only: a step that depends on |score| leaves not p but p |score|^2 invariant,
    which is off by 2/d in the variance of a Gaussian.

    Args:
      sde: the process.
      score_fn: `score_fn(x, t)`.
      snr: the ratio of the score term's norm to the noise's.
      num_steps: Langevin steps in each call.
    """

    def norm(v: Array) -> Array:
        return jnp.sqrt(jnp.sum(v**2, axis=range(1, v.ndim)))

    def step(key, x, t, s, state):
        def once(x, k):
            score = score_fn(x, s)
            z = jax.random.normal(k, x.shape, x.dtype)
            e = expand(2 * (snr * norm(z) / norm(score)) ** 2, x)
            return x + e * score + jnp.sqrt(2 * e) * z, None

        return jax.lax.scan(once, x, jax.random.split(key, num_steps))[0], state

    return Sampler(no_state, step)
