"""Evaluation: generated against real samples, beside what real samples score against each other; likelihoods."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from score_jax import data, metrics
from score_jax.errors import UserError
from score_jax.sde import SDE, ScoreFn

__all__ = ["against_data", "as_text", "compare", "likelihood", "logistic_regression", "pixels"]


def pixels(x: np.ndarray) -> np.ndarray:
    """Flat pixels as features, `[n, ...]` to `[n, d]`: for images too small for a network of features."""
    return np.asarray(x).reshape(len(x), -1)


def compare(
    generated: np.ndarray,
    real: np.ndarray,
    *,
    features: Callable[[np.ndarray], np.ndarray] = pixels,
    classifier: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, dict[str, float]]:
    """Every metric of generated samples, and its floor: the same metric between real samples at the same N.

    Args:
      generated: samples.
      real: real examples in random order; two disjoint sets of N are taken from it, where N is the
        number of generated samples or half of `real`, whichever is less.
      features: maps samples to `[n, d]`.
      classifier: maps samples to class probabilities `[n, classes]`.

    Returns:
      `{metric: {'generated': value, 'real': floor}}`, and N under `num_samples`.
    """
    n = min(len(generated), len(real) // 2)
    reference = features(real[:n])
    table: dict[str, dict[str, float]] = {"num_samples": {"generated": n, "real": n}}
    for column, samples in (("generated", generated[:n]), ("real", real[n : 2 * n])):
        f = features(samples)
        precision, recall = metrics.precision_recall(reference, f)
        row = {
            f"frechet_distance_{features.__name__}": metrics.frechet_distance(reference, f),
            f"kernel_distance_{features.__name__}": metrics.kernel_distance(reference, f),
            "precision": precision,
            "recall": recall,
            "sliced_wasserstein": metrics.sliced_wasserstein(reference, f),
        }
        if classifier is not None:
            row["classifier_score"] = metrics.classifier_score(classifier(samples))
        for name, value in row.items():
            table.setdefault(name, {})[column] = value
    return table


def against_data(
    generated: np.ndarray, datasets: Sequence[data.Dataset], *, centered: bool, classifier: bool
) -> dict[str, dict[str, float]]:
    """`compare` with all examples of some data sets, on pixels.

    Images are compared in [-1, 1], whatever the range of training, so that experiments compare with one another.

    Args:
      generated: samples in the range of training; images are rounded to the 256 values that a file would hold.
      datasets: where the real examples are.
      centered: whether the range of training is [-1, 1], otherwise [0, 1].
      classifier: whether to score by a logistic regression fitted to the real examples and their labels.
    """
    rng = np.random.default_rng(0)
    real, labels = (np.concatenate(part) for part in zip(*(d.read(np.arange(d.size)) for d in datasets), strict=True))
    order = rng.permutation(len(real))
    real = data.to_float(real[order], rng, centered=True)
    if generated.ndim == 4:
        generated = data.to_float(data.to_uint8(generated, centered=centered), rng, centered=True)
    return compare(generated, real, classifier=logistic_regression(real, labels[order]) if classifier else None)


def as_text(table: dict[str, dict[str, float]]) -> str:
    """The table of `compare`, one line a metric."""
    rows = [f"{name:28}{row['generated']:12.5g}{row['real']:12.5g}" for name, row in table.items()]
    return "\n".join([f"{'':28}{'generated':>12}{'real':>12}", *rows])


def logistic_regression(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A logistic regression on pixels, fitted to labelled examples: maps samples to class probabilities."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=2000).fit(pixels(x), y)
    return lambda samples: model.predict_proba(pixels(samples))


def likelihood(
    key: Array,
    sde: SDE,
    make_score_fn: Callable[[Array], ScoreFn],
    dataset: data.Dataset,
    *,
    num_images: int,
    batch_size: int,
    centered: bool,
    dequantized: bool,
    divergence: str,
    num_probes: int,
    num_repeats: int,
    rtol: float,
    atol: float,
    solver: str,
) -> dict[str, float]:
    """Bits per dimension of images of a data set.

    Args:
      key: a PRNG key.
      sde: the process.
      make_score_fn: from labels `[batch]` to the score of such images, a `jax.tree_util.Partial`.
      dataset: the images; those that are scored are chosen at random, but always the same.
      num_images: how many, or all of them if that is fewer.
      batch_size: images at a time.
      centered: as in `likelihood.bits_per_dim`, and so the rest.

    Returns:
      `bits_per_dim` and its `standard_error` over the images, whose noise and probes are in it; `num_images`; and
      `num_evaluations`, the score's for an image, the mean over the batches.
    """
    from score_jax.likelihood import bits_per_dim  # Here, as diffrax takes a second to import.
    from score_jax.ode import SolverError

    chosen = np.random.default_rng(0).permutation(dataset.size)[:num_images]
    batch_size = min(batch_size, len(chosen))
    bits, num_evaluations = [], []
    for i in tqdm(range(math.ceil(len(chosen) / batch_size)), unit="batch", disable=None):
        part = chosen[i * batch_size : (i + 1) * batch_size]
        # The last batch is filled up with images that do not count, so that nothing compiles anew.
        x, y = dataset.read(np.resize(part, batch_size))
        try:
            result = bits_per_dim(
                jax.random.fold_in(key, i),
                sde,
                make_score_fn(jnp.asarray(y)),
                jnp.asarray(x),
                centered=centered,
                dequantized=dequantized,
                divergence=divergence,
                num_probes=num_probes,
                num_repeats=num_repeats,
                rtol=rtol,
                atol=atol,
                solver=solver,
            )
        except SolverError as error:
            raise UserError(str(error)) from error
        bits.append(np.asarray(result.bits_per_dim)[: len(part)])
        num_evaluations.append(int(result.num_evaluations))
    everything = np.concatenate(bits)
    return {
        "bits_per_dim": float(everything.mean()),
        "standard_error": float(everything.std(ddof=1) / math.sqrt(len(everything))),
        "num_images": len(everything),
        "num_evaluations": float(np.mean(num_evaluations)),
    }
