"""Why noise is annealed: plain Langevin dynamics does not find the weights of modes that lie far apart.

Song & Ermon 2019, Figure 3: the mixture of weights 0.8 and 0.2 at (5, 5) and (-5, -5), its independent samples,
and those of plain and annealed Langevin dynamics from the same uniform start.

    python -m examples.annealing [--output=PICTURE]
"""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import score_jax as sj
from examples import picture

N = 10_000


def main(output: pathlib.Path) -> None:
    mixture = sj.GaussianMixture([0.8, 0.2], [[5.0, 5.0], [-5.0, -5.0]], [[[1.0, 0.0], [0.0, 1.0]]] * 2)
    start = jax.random.uniform(jax.random.key(0), (N, 2), minval=-8.0, maxval=8.0)
    sigmas = jnp.geomspace(20.0, 0.1, 15)  # Down to where the noise no longer shows.

    def conditional(x, sigma):
        widened = mixture.covariances + sigma**2 * jnp.eye(2)[None]
        return sj.GaussianMixture(mixture.weights, mixture.means, widened).score(x)

    @jax.jit
    def plain(key):
        return sj.unadjusted_langevin(key, mixture.score, start, step_size=0.1, num_steps=1500)

    @jax.jit
    def annealed(key):
        return sj.annealed_langevin(key, conditional, start, sigmas, step_size=3e-3, num_steps=100)

    key = jax.random.key(1)
    samples = {
        "independent samples": mixture.sample(key, N),
        "Langevin, 1,500 steps": plain(key),
        "annealed Langevin, 15 x 100 steps": annealed(key),
    }
    weights = {name: float(np.mean(x.sum(axis=1) > 0)) for name, x in samples.items()}
    for name, weight in weights.items():
        print(f"{name:36} weight of the first mode {weight:.3f} (exact 0.800)")

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.8), layout="constrained")
    grid = jnp.linspace(-9, 9, 200)
    points = jnp.stack(jnp.meshgrid(grid, grid), axis=-1)
    axes[0].contourf(grid, grid, jnp.exp(mixture.log_prob(points)), levels=20, cmap="Blues")
    axes[0].set_title("density")
    for ax, (name, x) in zip(axes[1:], samples.items(), strict=True):
        ax.scatter(x[:3000, 0], x[:3000, 1], s=1, color="tab:blue", alpha=0.4)
        ax.set_title(f"{name}\nweights {weights[name]:.2f} / {1 - weights[name]:.2f}")
    for ax in axes:
        ax.set(xlim=(-9, 9), ylim=(-9, 9), aspect="equal")
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    main(picture.output(__doc__, __file__))
