"""Score matching learns nothing where there are no data; noise puts data there.

Song & Ermon 2019, Section 3.2.1 and Figure 2: a network fitted to a mixture by sliced score matching (their Eq. 3)
learns the score near the modes alone, though every step has fresh data.  The same network fitted by denoising at many
noise levels (their Eq. 6) learns the score of the widened mixture everywhere, at levels that fill the space between
the modes; at smaller ones it fails as the other does.  Dashed lines enclose 99 % of the data.

    python -m examples.low_density [--output=PICTURE]
"""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax.numpy.linalg import norm

import score_jax as sj
from examples import picture
from score_jax.networks import MLP

SIGMAS = jnp.geomspace(10.0, 0.1, 20)
STEPS, BATCH, EDGE = 2000, 512, 9.0
NETWORK = MLP(features=64, num_blocks=2, embedding="fourier")
MIXTURE = sj.GaussianMixture([0.8, 0.2], [[5.0, 5.0], [-5.0, -5.0]], [[[1.0, 0.0], [0.0, 1.0]]] * 2)


@jax.jit
def score(params, x, sigma):
    sigma = jnp.broadcast_to(sigma, x.shape[:1])
    return NETWORK.apply(params, x / 5, sigma) / sigma[:, None]


def fit(loss):
    key, key_init = jax.random.split(jax.random.key(0))
    params = NETWORK.init(key_init, jnp.zeros((1, 2)), jnp.ones(1))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, i):
        key_data, key_loss = jax.random.split(jax.random.fold_in(key, i))
        x = MIXTURE.sample(key_data, BATCH)
        gradient = jax.grad(lambda params: loss(params, key_loss, x).mean())(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    for i in range(STEPS):
        params, state = step(params, state, i)
    return params


def grid(n):
    return np.stack(np.meshgrid(*[np.linspace(-EDGE, EDGE, n, dtype=np.float32)] * 2), axis=-1).reshape(-1, 2)


def main(output: pathlib.Path) -> None:
    clean = fit(lambda params, key, x: sj.sliced_score_matching(key, lambda x: score(params, x, 1.0), x))
    noisy = fit(lambda params, key, x: sj.ncsn_score_matching(key, partial(score, params), x, SIGMAS))
    fields = {"clean data": (MIXTURE, lambda x: score(clean, x, 1.0))}
    for sigma in (5.0, 1.0, 0.1):
        widened = sj.GaussianMixture(MIXTURE.weights, MIXTURE.means, MIXTURE.covariances + sigma**2 * jnp.eye(2)[None])
        fields[f"noise of {sigma:g}"] = widened, partial(score, noisy, sigma=sigma)

    data = MIXTURE.sample(jax.random.key(1), 20_000)
    square = jax.random.uniform(jax.random.key(2), (20_000, 2), minval=-EDGE, maxval=EDGE)
    level = jnp.quantile(MIXTURE.log_prob(data), 0.01)
    regions = {"at the data": data, "elsewhere": square[MIXTURE.log_prob(square) < level]}
    print("root mean square error of the score, over its root mean square\n" + " " * 16 + "  ".join(regions))
    for name, (law, estimate) in fields.items():
        errors = (norm(estimate(x) - law.score(x)) / norm(law.score(x)) for x in regions.values())
        print(f"{name:16}" + "".join(f"{error:11.3f}" for error in errors))

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 7.8), layout="constrained", sharex=True, sharey=True)
    plt.setp(axes, xticks=[-5, 0, 5], yticks=[-5, 0, 5])
    arrows, fine, bands = grid(15), grid(201), np.geomspace(0.01, 1, 13)
    x, y, within = (a.reshape(201, 201) for a in (*fine.T, np.asarray(MIXTURE.log_prob(fine))))
    for row, name in zip(axes, ["clean data", "noise of 5"], strict=True):
        law, estimate = fields[name]
        for ax, field in zip(row, [law.score(arrows), estimate(arrows)], strict=False):
            density = jnp.exp(law.log_prob(fine)).reshape(x.shape)
            ax.contourf(x, y, density, levels=20, cmap="Blues", vmax=1.5 * density.max())
            ax.quiver(*arrows.T, *np.asarray(field).T, scale=12 * float(law.score(arrows).max()), width=0.004)
        error = norm(estimate(fine) - law.score(fine), axis=1) / norm(law.score(fine), axis=1)
        image = row[2].contourf(x, y, error.reshape(x.shape), bands, cmap="magma_r", norm="log", extend="both")
        row[2].contour(x, y, within, levels=[level], colors="tab:blue")
        for ax, what in zip(row, ["density and exact score", "estimated score", "relative error"], strict=True):
            ax.set(title=f"{name}: {what}", xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), aspect="equal")
    figure.colorbar(image, ax=axes[:, 2], format="%g", ticks=[0.01, 0.1, 1], shrink=0.5)
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    main(picture.output(__doc__, __file__))
