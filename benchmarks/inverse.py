"""How near each method comes to the exact posterior: `python -m benchmarks.inverse [--samples=1000]`.

The prior is a mixture of three Gaussians in eight dimensions, with its exact score; the measurement is four of the
coordinates, or four random projections, plus noise.  Errors of mean and covariance are relative to the posterior's own
size, |mean - exact| / sqrt(trace C) and |cov - C| / |C|, the median over measurements drawn from the model.
`exact draws` is what as many samples of the posterior itself would show.
"""

import argparse
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

import score_jax as sj
from score_jax import timesteps

DIMENSIONS, MEASURED, NOISE_STD, MEASUREMENTS = 8, 4, 0.1, 8


def make_prior() -> sj.GaussianMixture:
    """Modes two standard deviations or so apart, each narrow in some directions and wide in others."""
    key_means, key_axes, key_sizes = jax.random.split(jax.random.key(1), 3)
    means = jax.random.normal(key_means, (3, DIMENSIONS))
    axes = jnp.linalg.qr(jax.random.normal(key_axes, (3, DIMENSIONS, DIMENSIONS)))[0]
    variances = jnp.exp(jax.random.uniform(key_sizes, (3, DIMENSIONS), minval=-4.0, maxval=0.0))
    return sj.GaussianMixture(jnp.array([0.5, 0.3, 0.2]), means, jnp.einsum("kde,ke,kfe->kdf", axes, variances, axes))


def moments(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean = weights @ x
    centred = x - mean[None]
    return mean, jnp.einsum("n,nd,ne->de", weights, centred, centred)


def exact_moments(mixture: sj.GaussianMixture) -> tuple[jax.Array, jax.Array]:
    mean, cov = moments(mixture.means, mixture.weights)
    return mean, cov + jnp.einsum("k,kde->de", mixture.weights, mixture.covariances)


def make_methods(sde: sj.SDE, prior: sj.GaussianMixture, A: jax.Array, n: int, num_steps: int) -> dict:
    """Each `method(key, y) -> (x [n, d], weights [n])` for one measurement."""
    score_fn, ts, even = prior.score_fn(sde), timesteps.log_snr(sde, num_steps), jnp.full(n, 1 / n)

    def forward(x):
        return x @ A.T

    def guided(make, key, y):
        score = make(sde, score_fn, jnp.broadcast_to(y, (n, MEASURED)), forward)
        key_prior, key = jax.random.split(key)
        x = sj.sample(key, sj.ancestral(sde, score), sj.sample_prior(key_prior, sde, (n, DIMENSIONS)), ts)
        return sj.tweedie(sde, score, x, ts[-1]), even

    def stepped(key, y):
        key_prior, key = jax.random.split(key)
        y = jnp.broadcast_to(y, (n, MEASURED))
        sampler = sj.dps_steps(sde, score_fn, sj.ancestral(sde, score_fn), y, forward, step_size=1.0)
        times = timesteps.uniform(sde, 1000)
        x = sj.sample(key, sampler, sj.sample_prior(key_prior, sde, (n, DIMENSIONS)), times)
        return sj.tweedie(sde, score_fn, x, times[-1]), even

    def replaced(make, key, y):
        key_prior, key = jax.random.split(key)
        x = sj.sample_prior(key_prior, sde, (n, DIMENSIONS))
        observed, mask = jnp.broadcast_to(A.T @ y, x.shape), (A.sum(axis=0) > 0)[None]
        return sj.inpaint(key, sde, score_fn, make(sde, score_fn), x, ts, observed, mask), even

    def corrected(sde, score_fn):
        return sj.chain(sj.ancestral(sde, score_fn), sj.annealed_langevin_corrector(sde, score_fn, num_steps=5))

    def smc(num_particles, key, y):
        key_prior, key = jax.random.split(key)
        x = sj.sample_prior(key_prior, sde, (num_particles, DIMENSIONS))
        particles = sj.twisted_smc(key, sde, score_fn, y, forward, x, ts, noise_std=NOISE_STD)
        return particles.x, jnp.exp(particles.log_weights)

    scores = {
        "dps, noise_std": functools.partial(sj.dps, noise_std=NOISE_STD),
        "dps, scale 1": functools.partial(sj.dps, noise_std=NOISE_STD, scale=1.0),
        "pigdm": functools.partial(sj.pigdm, noise_std=NOISE_STD),
        "mmps": functools.partial(sj.mmps, noise_std=NOISE_STD),
        "mmps, 4 iterations": functools.partial(sj.mmps, noise_std=NOISE_STD, iterations=4),
    }
    methods = {"exact draws": lambda key, y: (prior.posterior(A, y, NOISE_STD).sample(key, n), even)}
    if bool(((A == 0) | (A == 1)).all()):
        methods["replacement"] = functools.partial(replaced, sj.ancestral)
        methods["replacement, 5 corrections"] = functools.partial(replaced, corrected)
    methods |= {name: functools.partial(guided, make) for name, make in scores.items()}
    methods["dps, published: 1,000 steps of size 1"] = stepped
    return methods | {f"twisted smc, {k}": functools.partial(smc, k) for k in (16, 128, n)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=pathlib.Path, default="benchmarks/inverse.json")
    arguments = parser.parse_args()
    sde, prior = sj.VP(t_min=1e-4), make_prior()
    projections = jnp.linalg.qr(jax.random.normal(jax.random.key(2), (DIMENSIONS, MEASURED)))[0].T
    operators = {
        "mask": jnp.eye(DIMENSIONS)[:MEASURED],
        "general": projections * jnp.linspace(0.5, 1.5, MEASURED)[:, None],
    }
    table: dict[str, dict[str, float]] = {}
    for operator, A in operators.items():
        ys = prior.measurement(A, NOISE_STD).sample(jax.random.key(3), MEASUREMENTS)
        for name, method in make_methods(sde, prior, A, arguments.samples, arguments.steps).items():

            def errors(key, y, A=A, method=method):
                mean, cov = moments(*method(key, y))
                exact_mean, exact_cov = exact_moments(prior.posterior(A, y, NOISE_STD))
                size = jnp.sqrt(jnp.trace(exact_cov))
                return jnp.array(
                    [
                        jnp.linalg.norm(mean - exact_mean) / size,
                        jnp.linalg.norm(cov - exact_cov) / jnp.linalg.norm(exact_cov),
                    ]
                )

            start = time.perf_counter()
            error = np.median(jax.jit(jax.vmap(errors))(jax.random.split(jax.random.key(4), MEASUREMENTS), ys), axis=0)
            row = table.setdefault(name, {})
            row[f"{operator} mean"], row[f"{operator} covariance"] = map(float, error)
            row[f"{operator} seconds"] = time.perf_counter() - start
    arguments.json.write_text(json.dumps(table, indent=1) + "\n")
    columns = [f"{operator} {what}" for operator in operators for what in ("mean", "covariance")]
    print(" " * 28 + "".join(f"{c:>20}" for c in columns))
    for name, row in table.items():
        print(f"{name:28}" + "".join(f"{row[c]:20.3f}" if c in row else " " * 19 + "-" for c in columns))


if __name__ == "__main__":
    main()
