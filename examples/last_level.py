"""Where the ladder of noise levels should end, and what the last, denoising step does.

Annealed Langevin dynamics (Song & Ermon 2019) leaves noise of its last level, and one step without noise, to the
posterior mean at that level, removes it (Jolicoeur-Martineau et al. 2020).  Ladders of one ratio that end at 0.1, 0.01
and 0.001, for digits in [0, 1], differ in nothing but where they end: the same chains, seen earlier and later.  Noise
is measured where every digit is black.

    python -m examples.last_level [--output=PICTURE]
"""

import pathlib
from functools import partial

import jax
import matplotlib
import numpy as np

import score_jax as sj
from examples import picture
from examples.digits_langevin import CHAINS, STEPS, digits, fit, ladder, quality, score
from score_jax import data, report

LAST = (0.1, 0.01, 0.001)


def main(output: pathlib.Path) -> None:
    score_fn = partial(score, fit())
    start = jax.random.uniform(jax.random.key(2), (CHAINS, 8, 8, 1))
    sigmas, step_size = ladder(min(LAST))
    ends = [len(ladder(last)[0]) for last in LAST]  # Levels from the first to each.

    @jax.jit
    def sample(key):
        states = sj.annealed_langevin(
            key, score_fn, start, sigmas, step_size=step_size, num_steps=STEPS, denoise=False, trajectory=True
        )
        noisy = states[np.array(ends)]
        return noisy, [x + sigma**2 * score_fn(x, sigma) for x, sigma in zip(noisy, LAST, strict=True)]

    samples = jax.device_get(sample(jax.random.key(3)))
    measure, black = quality(), digits("train")[0].max(axis=0) == 0

    def show(name, x):
        noise = np.sqrt(np.mean(x[:, black] ** 2))
        print(f"{name:38}{noise:9.5f}" + "{:12.3f}{:14.2f}".format(*measure(x)))

    print(f"last level, evaluations{'':15}noise left  Frechet  classifier score")
    for last, end, *pair in zip(LAST, ends, *samples, strict=True):
        for x, how in zip(pair, ("as it is", "denoised"), strict=True):
            show(f"{last:<6g}{end * STEPS + (how == 'denoised'):5}  {how}", x)
    show("digits not trained on", digits("test")[0])

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 7.9), layout="constrained")
    for row, part, how in zip(axes, samples, ("without", "with"), strict=True):
        for ax, x, last in zip(row, part, LAST, strict=True):
            ax.imshow(report.image_grid(data.to_uint8(x[:36], centered=False)), cmap="gray", interpolation="nearest")
            ax.set_title(f"down to {last:g}, {how} denoising")
            ax.axis("off")
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    main(picture.output(__doc__, __file__))
