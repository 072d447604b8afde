"""Guidance and composition: from scores to the score of a law that was not trained.

The gradient of Bayes' rule p(x_t | y) ~ p(x_t) p(y | x_t) turns a score and a classifier of noisy inputs into the
score of a class (Song et al. 2021, "Score-Based Generative Modeling through SDEs", Eq. 14; the scale w, whose
likelihood is sharpened to p(y | x_t)^w, by Dhariwal & Nichol 2021, "Diffusion Models Beat GANs", Section 4),

    score(x, t) + w grad_x log p(y | x_t = x).                              (1)

Bayes' rule backwards, log p(y | x_t) = log p(x_t | y) - log p(x_t) + const, does without the classifier (Ho &
Salimans 2022, "Classifier-Free Diffusion Guidance", Eq. 6): with the conditional score c and the unconditional u,

    u + w (c - u)  =  c + (w - 1) (c - u),                                  (2)

where w = 0 leaves u, w = 1 leaves c, and larger w move away from u.  Ho & Salimans call w - 1 the strength.  The
same with a worse model of the same law in place of u moves away from its errors (Karras et al. 2024, "Guiding a
Diffusion Model with a Bad Version of Itself", Eq. 3).

For w other than 0 and 1 neither (1) nor (2) is the score of a forward process: at each t it is the gradient of the
density p(x_t) p(y | x_t)^w, but these densities at different t are not noised versions of one another.

Dynamic thresholding (Saharia et al. 2022, "Photorealistic Text-to-Image Diffusion Models", Section 2.3) keeps a
strong guidance from driving the posterior mean x_0(x, t) out of the data's range [-1, 1]:

    x_0 <- clip(x_0, -s, s) / s,    s = max(1, percentile of |x_0| over the example).       (3)

Composition, of scores s_i of densities p_i (Du et al. 2023, "Reduce, Reuse, Recycle"):

    prod_i p_i^(w_i)  has the score  sum_i w_i s_i,                         (4)
    sum_i w_i p_i     has the score  sum_i r_i s_i,    r_i = w_i p_i(x) / sum_j w_j p_j(x).  (5)

Noising is linear in the density, so (5) at every t is the score of the noised mixture.  (4) at t > 0 is the score of
the product of the noised densities, which is not the noised product: it is the score of what one wants at t = 0
only.  A sampler of the reverse equations that follows it ends elsewhere; annealed Langevin dynamics, for which the
densities on the way need only lead to the right one, does not (Section 3 there).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from score_jax.batches import call_score, expand
from score_jax.parameterization import from_energy, tweedie
from score_jax.sde import SDE, ScoreFn

__all__ = [
    "autoguidance",
    "classifier_free_guidance",
    "classifier_guidance",
    "dynamic_thresholding",
    "mixture_of_densities",
    "product_of_densities",
]

LogDensity = Callable[[Array, Array], Array]


def classifier_guidance(
    score_fn: ScoreFn,
    log_likelihood: LogDensity,
    *,
    scale: float | Array = 1.0,
    interval: tuple[float, float] | None = None,
) -> ScoreFn:
    """The score of a class, by a classifier of noisy inputs (Eq. 1).

    Args:
      score_fn: the score without the class; or of the class, to be guided towards it all the more.
      log_likelihood: `log_likelihood(x, t) -> [batch]`, log p(y | x_t = x) in nats; it closes over the labels y.
      scale: w, a scalar: 1 is Bayes' rule.
      interval: as in `classifier_free_guidance`.

    Raises:
      ValueError: if the interval's ends are out of order; when called, if the likelihood is not one number an example.
    """
    # A likelihood is the Boltzmann factor of the energy -log p.
    gradient = from_energy(lambda x, t: -log_likelihood(x, t))
    return _within(interval, score_fn, lambda x, t, score: scale * gradient(x, t))


def classifier_free_guidance(
    conditional: ScoreFn,
    unconditional: ScoreFn,
    *,
    scale: float | Array,
    interval: tuple[float, float] | None = None,
) -> ScoreFn:
    """The conditional score, moved away from the unconditional one (Eq. 2).

    Args:
      conditional: the score given the class, text, image or whatever it closes over.
      unconditional: the score without it.
      scale: w, a scalar: 0 is unconditional, 1 conditional and exactly `conditional`; images take 1.5 to 8.
        In the notation of Ho & Salimans (2022) it is one more than theirs.
      interval: `(t_low, t_high)`, the times of the process, ends included, between which to guide; `conditional`
        alone applies, and `unconditional` is not evaluated, at other times (Kynkaanniemi et al. 2024).  Their noise
        level sigma is a time of `EDM`, and of another process `timesteps.time_of_log_snr(sde, -2 * log(sigma))`.
        None: everywhere.

    Raises:
      ValueError: if the interval's ends are out of order.
    """
    return _within(interval, conditional, lambda x, t, score: (scale - 1) * (score - call_score(unconditional, x, t)))


def autoguidance(score_fn: ScoreFn, worse: ScoreFn, *, scale: float | Array) -> ScoreFn:
    """The score, moved away from a worse model's of the same law (Eq. 2, with that for u; Karras et al. 2024).

    Args:
      score_fn: the good model's, with or without a condition.
      worse: a smaller or less trained one's, with the same condition.
      scale: w, a scalar: 1 is exactly `score_fn`.
    """
    return classifier_free_guidance(score_fn, worse, scale=scale)


def _within(
    interval: tuple[float, float] | None, score_fn: ScoreFn, correction: Callable[[Array, Array, Array], Array]
) -> ScoreFn:
    """`score + correction(x, t, score)` at the times of an interval, ends included, and the score alone at others."""
    if interval is None:

        def everywhere(x: Array, t: Array) -> Array:
            score = call_score(score_fn, x, t)
            return score + correction(x, t, score)

        return everywhere

    if len(interval) != 2 or not interval[0] < interval[1]:
        raise ValueError(f"interval needs t_low < t_high, got {interval}")

    low, high = interval

    def guided(x: Array, t: Array) -> Array:
        t = jnp.asarray(t)
        score, inside = call_score(score_fn, x, t), (low <= t) & (t <= high)

        def corrected() -> Array:
            return score + jnp.where(expand(inside, x), correction(x, t, score), 0.0)

        return jax.lax.cond(inside.any(), corrected, lambda: score)

    return guided


def dynamic_thresholding(sde: SDE, score_fn: ScoreFn, *, percentile: float = 99.5) -> ScoreFn:
    """The score whose posterior mean stays in [-1, 1] (Eq. 3), for data in that range.

    Where the posterior mean is in the range already, the score is `score_fn`'s, bit for bit.

    Args:
      sde: the process.
      score_fn: `score_fn(x, t)`, guided as a rule.
      percentile: of the absolute values of each example, above 0 and at most 100; 100 only rescales, and less clips.

    Raises:
      ValueError: if the percentile is out of range.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be above 0 and at most 100, got {percentile}")

    def thresholded(x: Array, t: Array) -> Array:
        score = call_score(score_fn, x, t)
        x0 = tweedie(sde, lambda x, t: score, x, t)
        largest = jnp.percentile(jnp.abs(x0), percentile, axis=tuple(range(1, x.ndim)))
        bound = expand(jnp.maximum(largest, 1.0), x)
        # The change alone is converted to a score: at small sigma all of x_0 would lose digits.
        return score + expand(sde.alpha(t) / sde.sigma(t) ** 2, x) * (jnp.clip(x0, -bound, bound) / bound - x0)

    return thresholded


def product_of_densities(score_fns: Sequence[ScoreFn], *, weights: Sequence[float | Array] | None = None) -> ScoreFn:
    """The score of a product of powers of densities (Eq. 4), exact at t = 0 only: see the module's note.

    Args:
      score_fns: one for each density.
      weights: the powers, scalars; negative ones divide.  None: all one.

    Raises:
      ValueError: if there is no score, or not one weight each.
    """
    powers = _weights(weights, score_fns)

    def score_fn(x: Array, t: Array) -> Array:
        scores = jnp.stack([call_score(fn, x, t) for fn in score_fns])
        return jnp.sum(expand(powers, scores) * scores, axis=0)

    return score_fn


def mixture_of_densities(
    score_fns: Sequence[ScoreFn], log_densities: Sequence[LogDensity], *, weights: Sequence[float | Array] | None = None
) -> ScoreFn:
    """The score of a mixture of densities (Eq. 5), exact at every time.

    Args:
      score_fns: one for each density.
      log_densities: `log_density(x, t) -> [batch]`, log p_i(x_t = x) in nats but for one constant common to all.
      weights: of the densities, positive scalars; they need not sum to one.  None: equal.

    Raises:
      ValueError: if there is no score, or not one density and one weight each.
    """
    if len(log_densities) != len(score_fns):
        raise ValueError(f"a mixture needs one log density a score, got {len(log_densities)} for {len(score_fns)}")
    log_weights = jnp.log(_weights(weights, score_fns))

    def score_fn(x: Array, t: Array) -> Array:
        scores = jnp.stack([call_score(fn, x, t) for fn in score_fns])
        log_joint = log_weights[:, None] + jnp.stack([log_density(x, t) for log_density in log_densities])
        return jnp.sum(jax.vmap(expand)(jax.nn.softmax(log_joint, axis=0), scores) * scores, axis=0)

    return score_fn


def _weights(weights: Sequence[float | Array] | None, score_fns: Sequence[ScoreFn]) -> Array:
    weights = [1.0] * len(score_fns) if weights is None else weights
    if not score_fns or len(weights) != len(score_fns):
        raise ValueError(f"a composition needs scores and one weight each, got {len(weights)} for {len(score_fns)}")
    return jnp.stack([jnp.asarray(weight) for weight in weights])
