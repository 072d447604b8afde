"""Evaluation: generated against real samples, beside what real samples score against each other; likelihoods."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from tqdm import tqdm

from score_jax import data, metrics, sharding
from score_jax.errors import UserError
from score_jax.networks.dequantizer import Dequantizer
from score_jax.sde import SDE, ScoreFn, perturb

__all__ = [
    "accuracy",
    "against_data",
    "as_text",
    "compare",
    "fit_dequantizer",
    "likelihood",
    "logistic_regression",
    "pixels",
]


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

    Raises:
      UserError: for fewer than 2 samples or 4 real examples.
    """
    n = min(len(generated), len(real) // 2)
    if n < 2:
        raise UserError(
            "to compare takes at least 2 samples and 4 real examples, half of them for the floor, got "
            f"{len(generated)} and {len(real)}"
        )
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
    generated: np.ndarray,
    datasets: Sequence[data.Dataset],
    *,
    classifier: bool,
    labels: np.ndarray | None = None,
) -> dict[str, dict[str, float]]:
    """`compare` with all examples of some data sets, on pixels.

    Images are compared in [-1, 1], whatever the range of training, so that experiments compare with one another.

    Args:
      generated: samples, images as uint8.
      datasets: where the real examples are.
      classifier: whether to score by a logistic regression fitted to the real examples and their labels.
      labels: of the samples, if they were made for some; the classifier then also tells which of them look their
        class, `class_agreement`, beside its accuracy on real examples, none of which it was fitted to.
    """
    rng = np.random.default_rng(0)
    real, y = (np.concatenate(part) for part in zip(*(d.read(np.arange(d.size)) for d in datasets), strict=True))
    if classifier and (y < 0).any():
        raise UserError("config.evaluation.classifier: there are real images without a label: set it to False")
    order = rng.permutation(len(real))
    real = data.to_float(real[order], centered=True)
    generated = data.to_float(generated, centered=True)
    y = y[order]
    table = compare(generated, real, classifier=logistic_regression(real, y) if classifier else None)
    if classifier and labels is not None:
        held_out = len(real) - int(table["num_samples"]["real"])
        judge = logistic_regression(real[:held_out], y[:held_out])
        pairs = {"generated": (generated, labels), "real": (real[held_out:], y[held_out:])}
        table["class_agreement"] = {k: float(np.mean(judge(x).argmax(axis=1) == c)) for k, (x, c) in pairs.items()}
    return table


def as_text(table: dict[str, dict[str, float]]) -> str:
    """The table of `compare`, one line a metric."""
    width = max(28, *map(len, table))
    rows = [f"{name:{width}}{row['generated']:12.5g}{row['real']:12.5g}" for name, row in table.items()]
    return "\n".join([f"{'':{width}}{'generated':>12}{'real':>12}", *rows])


def logistic_regression(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A logistic regression on pixels, fitted to labelled examples: maps samples to class probabilities."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=2000).fit(pixels(x), y)

    def probabilities(samples: np.ndarray) -> np.ndarray:
        table = np.zeros((len(samples), y.max() + 1))  # Of a class without examples, too.
        table[:, model.classes_] = model.predict_proba(pixels(samples))
        return table

    return probabilities


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
    dequantizer: Callable[[Array, Array], tuple[Array, Array]] | None = None,
    mesh: Mesh | None = None,
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
      mesh: of the devices to divide the images over, if it is not one alone.

    Returns:
      `bits_per_dim` and its `standard_error` over the images, whose noise and probes are in it; `num_images`; and
      `num_evaluations`, the score's for an image, the mean over the batches.
    """
    from score_jax.likelihood import bits_per_dim  # Here, as diffrax takes a second to import.
    from score_jax.ode import SolverError

    bits, num_evaluations = [], []
    for i, (_, x, y, count) in enumerate(_batches(dataset, num_images, batch_size, mesh)):
        try:
            result = bits_per_dim(
                jax.random.fold_in(key, i),
                sde,
                make_score_fn(y),
                x,
                centered=centered,
                dequantized=dequantized,
                divergence=divergence,
                num_probes=num_probes,
                num_repeats=num_repeats,
                rtol=rtol,
                atol=atol,
                solver=solver,
                dequantizer=dequantizer,
            )
        except SolverError as error:
            raise UserError(str(error)) from error
        bits.append(sharding.to_host(result.bits_per_dim)[:count])
        num_evaluations.append(int(result.num_evaluations))
    everything = np.concatenate(bits)
    return {
        "bits_per_dim": float(everything.mean()),
        "standard_error": float(everything.std(ddof=1) / math.sqrt(len(everything))),
        "num_images": len(everything),
        "num_evaluations": float(np.mean(num_evaluations)),
    }


def fit_dequantizer(
    key: Array,
    sde: SDE,
    make_score_fn: Callable[[Array], ScoreFn],
    dataset: data.Dataset,
    *,
    num_steps: int,
    batch_size: int,
    centered: bool,
    dequantized: bool,
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """A dequantizer for `likelihood`, fitted to the evidence lower bound (`likelihood.elbo`) of images.

    Args:
      key: a PRNG key.
      sde: the process.
      make_score_fn: as in `likelihood`, and so the rest.
      dataset: images to fit it to, not those that are scored.
      num_steps: steps of Adam.
    """
    from score_jax.likelihood import elbo, place_in_cells  # Here, as diffrax takes a second to import.

    network, optimizer = Dequantizer(), optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))

    def draw(params: Any, key: Array, images: Array) -> tuple[Array, Array]:
        return network.apply(params, images, jax.random.normal(key, images.shape))  # type: ignore[return-value]

    def loss_fn(params: Any, key: Array, images: Array, score_fn: ScoreFn) -> Array:
        key_noise, key_bound = jax.random.split(key)
        u, log_q = draw(params, key_noise, images)
        x, _ = place_in_cells(images, u, centered=centered, dequantized=dequantized)
        return jnp.mean(log_q - elbo(key_bound, sde, score_fn, x)[0])

    @jax.jit
    def step(params: Any, state: Any, key: Array, images: Array, score_fn: ScoreFn) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss_fn)(params, key, images, score_fn), state)
        return optax.apply_updates(params, updates), state

    key_init, key = jax.random.split(key)
    rng, example = np.random.default_rng(0), jnp.zeros((1, *dataset.shape), jnp.uint8)
    params = network.init(key_init, example, jnp.zeros(example.shape))
    state = optimizer.init(params)
    for i in tqdm(range(num_steps), unit="step", disable=None):
        images, y = dataset.read(rng.integers(0, dataset.size, batch_size))
        params, state = step(params, state, jax.random.fold_in(key, i), images, make_score_fn(jnp.asarray(y)))
    return functools.partial(jax.jit(draw), jax.tree.map(sharding.to_host, params))


def accuracy(
    key: Array,
    sde: SDE,
    logits_fn: Callable[[Array, Array], Array],
    dataset: data.Dataset,
    *,
    num_images: int,
    batch_size: int,
    centered: bool,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """The share of images of a data set whose class a classifier tells, at five times of the process.

    Args:
      key: a PRNG key for the noise.
      sde: the process.
      logits_fn: `logits_fn(x, t) -> [batch, classes]`, a `jax.tree_util.Partial`.
      dataset: the images; those used are chosen at random, but always the same.
      num_images: how many, or all of them if that is fewer.
      batch_size: images at a time.
      centered: whether the range of training is [-1, 1], otherwise [0, 1].
      mesh: as in `likelihood`.

    Returns:
      `{'accuracy_at_0.25': ...}` for each time.
    """
    times = jnp.linspace(sde.t_min, sde.t_max, 5)

    @jax.jit
    def right(logits_fn: Callable, key: Array, numbers: Array, x: Array, y: Array) -> Array:
        def draw(number: Array) -> Array:
            return jax.random.normal(jax.random.fold_in(key, number), x.shape[1:])

        def at(t: Array) -> Array:
            return logits_fn(perturb(sde, x, jax.vmap(draw)(numbers), t), t).argmax(axis=1) == y

        return jax.lax.map(at, times)

    found = []
    for numbers, x, y, count in _batches(dataset, num_images, batch_size, mesh):
        x = data.to_float(x, centered=centered)
        found.append(sharding.to_host(right(logits_fn, key, numbers, x, y))[:, :count])
    shares = np.concatenate(found, axis=1).mean(axis=1)
    return {f"accuracy_at_{t:.2g}": float(share) for t, share in zip(times, shares, strict=True)}


def _batches(
    dataset: data.Dataset, num_images: int, batch_size: int, mesh: Mesh | None
) -> Iterator[tuple[Array, Array, Array, int]]:
    """The numbers of images chosen at random, but always the same, these images, labels, and how many count."""
    chosen = np.random.default_rng(0).permutation(dataset.size)[:num_images]
    parts = data.chunks(len(chosen), batch_size, multiple=sharding.num_shards(mesh))
    for part, count in tqdm(parts, unit="batch", disable=None):
        yield *sharding.put(mesh, (part, *dataset.read(chosen[part]))), count
