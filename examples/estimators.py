"""Five estimators of score matching against the dimension: what they estimate, how noisily, and at what cost.

Exact (Hyvarinen 2005, Theorem 1), sliced, plain and variance-reduced (Song et al. 2019, "Sliced Score Matching",
Eqs. 7 and 8), by finite differences (Pang et al. 2020), and denoising (Vincent 2011, Eq. 11), all of one network of
sines with random parameters, on Gaussian data, where the objective has a closed form.  Bars are two standard errors;
gradients are of minibatches of 64, and their time is relative to that of evaluating the network.

    python -m examples.estimators [--output=PICTURE]
"""

import pathlib
import time
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax.flatten_util import ravel_pytree

import score_jax as sj
from examples import picture

DIMENSIONS = (2, 8, 32, 128, 512, 1024)
BATCH, ROUNDS, HIDDEN, SIGMA = 64, 64, 64, 0.1
ESTIMATORS = {
    "exact": lambda key, fn, x: sj.exact_score_matching(fn, x),
    "sliced": partial(sj.sliced_score_matching, variance_reduced=False),
    "sliced, variance-reduced": sj.sliced_score_matching,
    "finite differences": sj.finite_difference_score_matching,
    "denoising": partial(sj.vincent_score_matching, sigma=SIGMA),
}


def network(params, x):
    w, b, u = params
    return jnp.sin(x @ w.T + b[None]) @ u - x


@jax.jit
@jax.value_and_grad
def objective(params, variance):
    """E[div s + |s|^2 / 2] under N(0, variance I), in closed form, and its gradient."""
    w, b, u = params

    def mean_cos(w, b):
        return jnp.cos(b) * jnp.exp(-variance / 2 * jnp.sum(w**2, axis=-1))

    difference, total = (mean_cos(w[:, None] + sign * w[None], b[:, None] + sign * b[None]) for sign in (-1, 1))
    squares = jnp.sum(u @ u.T * (difference - total)) / 4
    return (variance / 2 - 1) * w.shape[1] + (1 - variance) * jnp.sum(w * u, axis=1) @ mean_cos(w, b) + squares


def gradient(estimator, params, key, x):
    def loss(params):
        losses = estimator(key, partial(network, params), x)
        return losses.mean(), losses

    gradient, losses = jax.grad(loss, has_aux=True)(params)
    return ravel_pytree(gradient)[0], losses


def timed(fn, *args):
    start = time.perf_counter()
    return jax.block_until_ready(fn(*args)), time.perf_counter() - start


def measure(d):
    """For each estimator: the gap to the closed form, its standard error, the gradient's variance, the time."""
    key, *keys = jax.random.split(jax.random.key(d), 4)
    w, u = (jax.random.normal(k, (HIDDEN, d)) / n**0.5 for k, n in zip(keys[:2], (d, HIDDEN), strict=True))
    params = w, jax.random.uniform(keys[2], (HIDDEN,), maxval=2 * np.pi), u
    runs = {name: (jax.jit(partial(gradient, estimator)), []) for name, estimator in ESTIMATORS.items()}
    evaluate, evaluation = jax.jit(network), []
    for i in range(ROUNDS):
        key_x, key_loss = jax.random.split(jax.random.fold_in(key, i))
        x = jax.block_until_ready(jax.random.normal(key_x, (BATCH, d)))
        evaluation.append(timed(evaluate, params, x)[1])
        for name, (fn, results) in runs.items():
            if name != "exact" or i * d < 4096:  # Seconds each in many dimensions: a few will do.
                results.append(timed(fn, params, key_loss, x))
    rows = []
    for name, (_, results) in runs.items():
        smooth = name == "denoising"  # Of the smoothed law, and beside a constant, E |eps|^2 / (2 sigma^2).
        value, mean = objective(params, 1 + SIGMA**2 if smooth else 1.0)
        mean = np.asarray(ravel_pytree(mean)[0])
        gap = np.array([losses for (_, losses), _ in results]) - value - smooth * d / (2 * SIGMA**2)
        variance = np.mean([np.sum((g - mean) ** 2) for (g, _), _ in results]) / np.sum(mean**2)
        seconds = np.median([s for _, s in results[1:]]) / np.median(evaluation[1:])  # The first compiles.
        rows.append((gap.mean() / d, gap.std() / gap.size**0.5 / d, variance, seconds))
    return rows


def main(output: pathlib.Path) -> None:
    gap, error, variance, seconds = np.moveaxis([measure(d) for d in DIMENSIONS], 2, 0)
    tables = {
        "loss - closed form, per dimension": np.char.add(np.char.mod("%.4f", gap), np.char.mod(" (%.4f)", error)),
        "variance of the gradient / its squared norm": np.char.mod("%.2f", variance),
        "time of the gradient / of the network": np.char.mod("%.1f", seconds),
    }
    for title, table in tables.items():
        print(f"{title}\n{'':24}" + "".join(f"{d:17}" for d in DIMENSIONS))
        for name, row in zip(ESTIMATORS, table.T, strict=True):
            print(f"{name:24}" + "".join(f"{cell:>17}" for cell in row))

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for i, name in enumerate(ESTIMATORS):
        style = dict(marker="oDs^v"[i], markersize=5, color=f"C{i}", linestyle="--" if i == 3 else "-", label=name)
        shifted = np.array(DIMENSIONS) * 1.15 ** (i - 2)
        axes[0].errorbar(shifted, gap[:, i], 2 * error[:, i], capsize=2, **{**style, "linestyle": "none"})
        axes[1].plot(DIMENSIONS, variance[:, i], **style)
        axes[2].plot(DIMENSIONS, seconds[:, i], **style)
    axes[0].axhline(0, color="black", linewidth=0.8)
    for ax, title in zip(axes, tables, strict=True):
        ax.set_yscale("symlog", linthresh=0.01) if ax is axes[0] else ax.set_yscale("log")
        ax.set(title=title, xscale="log", xlabel="dimension", xticks=DIMENSIONS, xticklabels=DIMENSIONS)
        ax.minorticks_off()
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    main(picture.output(__doc__, __file__))
