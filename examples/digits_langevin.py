"""Langevin dynamics on images, with and without annealing.

Song & Ermon 2019, Section 4.3: one network, trained by denoising on scikit-learn's digits in [0, 1] at noise levels
from 1 to 0.001.  Chains from uniform noise do not find the digits at the level 0.01 alone; down a ladder of levels that
ends there, by as many evaluations, they do.

    python -m examples.digits_langevin [--output=PICTURE]
"""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import score_jax as sj
from examples import picture
from score_jax import data, evaluate, metrics, report, train
from score_jax.networks import UNet

SDE = sj.VE(sigma_min=0.001, sigma_max=1.0)
NETWORK = UNet(16, (1, 2), 1, (), embedding="fourier")
TRAINING_STEPS, BATCH, CHAINS = 1200, 64, 512
PER_DECADE, STEPS = 8, 10  # Noise levels, and Langevin steps at each.


def digits(split):
    dataset = data.load("digits", split)
    x, labels = dataset.read(np.arange(dataset.size))
    return data.to_float(x, centered=False), labels


def score(params, x, sigma):
    sigma = jnp.broadcast_to(sigma, x.shape[:1])
    return -NETWORK.apply(params, x / sj.expand(1 + sigma, x), sigma) / sj.expand(sigma, x)


def fit():
    train.tune_cpu()
    x, rng = digits("train")[0], np.random.default_rng(0)

    def loss(params, key, x):
        key, key_time = jax.random.split(key)
        t, _ = sj.timesteps.draw_stratified(key_time, SDE, BATCH)
        return sj.denoising_score_matching(key, SDE, lambda x, t: score(params, x, SDE.sigma(t)), x, t).mean() / 64

    params = jax.jit(NETWORK.init)(jax.random.key(0, impl="rbg"), x[:1], jnp.ones(1))  # "rbg": soon compiled.
    optimizer = train.make_optimizer(4e-3, num_steps=TRAINING_STEPS, warmup_steps=50, decay="cosine")
    state, step = train.init_state(params, optimizer), train.make_train_step(loss, optimizer, ema_decay=0.99)
    for _ in range(TRAINING_STEPS):
        state, _ = step(state, jax.random.key(1), x[rng.integers(0, len(x), BATCH)])
    return state.ema


def ladder(last):
    sigmas = np.geomspace(1, last, round(-PER_DECADE * np.log10(last)) + 1)
    return sigmas, sj.timesteps.langevin_step_size(last, 10 ** (1 / PER_DECADE), STEPS)


def quality():
    classify = evaluate.logistic_regression(*digits("train"))
    distance = partial(metrics.frechet_distance, evaluate.pixels(digits("train")[0]))
    return lambda x: (distance(evaluate.pixels(x)), metrics.classifier_score(classify(x)))


def main(output: pathlib.Path) -> None:
    sigmas, e = ladder(0.01)
    score_fn, start = partial(score, fit()), jax.random.uniform(jax.random.key(2), (CHAINS, 8, 8, 1))

    @jax.jit
    def chains(key):
        fn = partial(score_fn, sigma=sigmas[-1])
        x = sj.unadjusted_langevin(key, fn, start, step_size=e, num_steps=len(sigmas) * STEPS, trajectory=True)[::STEPS]
        plain = x.at[-1].add(sigmas[-1] ** 2 * fn(x[-1]))  # Denoised in the end, as is the other.
        annealed = sj.annealed_langevin(key, score_fn, start, sigmas, step_size=e, num_steps=STEPS, trajectory=True)
        return plain, annealed

    measure, names = quality(), ("without annealing", "with annealing", "digits not trained on")
    states = [*jax.device_get(chains(jax.random.key(3))), digits("test")[0][None]]
    print(f"{len(sigmas) * STEPS} evaluations{'':8}Frechet distance  classifier score")
    for name, x in zip(names, states, strict=True):
        print(f"{name:23}" + "{:16.3f}{:18.2f}".format(*measure(x[-1])))

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 6.3), layout="constrained")
    shown = np.linspace(0, len(sigmas), 8).round().astype(int)
    for ax, name, x in zip(axes, names, states, strict=False):
        images = data.to_uint8(x[shown, :8].swapaxes(0, 1).reshape(64, 8, 8, 1), centered=False)
        ax.imshow(report.image_grid(images), cmap="gray", interpolation="nearest", extent=(0, 8, 8, 0))
        ax.set(title=f"Langevin dynamics {name}", xlabel="evaluations", yticks=[], frame_on=False)
        ax.set_xticks(0.5 + np.arange(8), shown * STEPS)
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    main(picture.output(__doc__, __file__))
