"""Error against evaluations, sampler by sampler: `python -m benchmarks.solvers [--workdir=runs/vp_digits]`.

1. On a mixture of two Gaussians in two dimensions with its exact score, on DDPM's linear chain: 50,000 samples that
   start from the exact marginal; the energy distance to the exact law, times 10,000.
2. With `--workdir`, on the digits model trained there by `configs/vp_digits.py`: 1,024 samples; the Frechet distance on
   pixels to all 1,797 digits.  1,000 evaluations take minutes each on two cores.
3. The samplers that choose their steps, their evaluations counted: the adaptive one by its tolerance, and Picard's
   iteration, which takes many at once, by the steps of DDIM that it takes; on both.
4. With `--diffusers`, the schedulers of diffusers (an extra, `pip install diffusers torch`) on the mixture.

Energy distances are of the samples' cloud-in-cell histogram with 0.01 wide cells and the law's density there, by
Fourier transforms: exact but for the cells' width, and without the noise of a second sample.  The diagonal, 0.4 for
50,000 samples, is subtracted: samples of the law itself have 0, with a standard deviation of about 0.2.
"""

import argparse
import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft

import score_jax as sj
from score_jax import timesteps, train

BUDGETS = (5, 10, 20, 50, 100, 1000)
NUM_SAMPLES, HALF, CELL = 50_000, 8.0, 0.01
MIXTURE = sj.GaussianMixture(
    jnp.array([0.7, 0.3]),
    jnp.array([[1.5, 0.5], [-1.5, -1.0]]),
    jnp.array([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]]]),
)


def corrected(predictor, corrector):
    return lambda sde, score_fn: sj.chain(predictor(sde, score_fn), corrector(sde, score_fn))


# Each with the evaluations of a step and its grid.
SAMPLERS = {
    "Euler-Maruyama": (sj.euler_maruyama, 1, "uniform"),
    "reverse diffusion": (sj.reverse_diffusion, 1, "uniform"),
    "ancestral": (sj.ancestral, 1, "uniform"),
    "predictor-corrector": (corrected(sj.reverse_diffusion, sj.annealed_langevin_corrector), 2, "uniform"),
    "Euler": (sj.euler, 1, "quadratic"),
    "DDIM": (sj.ddim, 1, "quadratic"),
    "Heun": (sj.heun, 2, "karras"),
    "stochastic Heun": (functools.partial(sj.stochastic_heun, churn=0.1), 2, "karras"),
    "Adams-Bashforth": (sj.adams_bashforth, 1, "quadratic"),
    "DEIS 3": (sj.deis, 1, "quadratic"),
    "DPM-Solver++ 2S": (sj.dpm_solver_pp_singlestep, 2, "quadratic"),
    "DPM-Solver++ 2M": (sj.dpm_solver_pp, 1, "quadratic"),
    "DPM-Solver++ 2M, midpoint": (functools.partial(sj.dpm_solver_pp, solver_type="midpoint"), 1, "quadratic"),
    "DPM-Solver++ 2M, learned grid": (sj.dpm_solver_pp, 1, "curvature"),
    "DPM-Solver++ 2M, midpoint, learned grid": (
        functools.partial(sj.dpm_solver_pp, solver_type="midpoint"),
        1,
        "curvature",
    ),
    "DPM-Solver++ 3M, log-SNR": (functools.partial(sj.dpm_solver_pp, order=3), 1, "log_snr"),
    "DPM-Solver++ 2M SDE": (sj.sde_dpm_solver_pp, 1, "quadratic"),
    "DPM-Solver++ 2M SDE, midpoint": (functools.partial(sj.sde_dpm_solver_pp, solver_type="midpoint"), 1, "quadratic"),
    "DPM-Solver++ 2M SDE, learned grid": (sj.sde_dpm_solver_pp, 1, "curvature"),
    "DPM-Solver++ 2M SDE, midpoint, learned grid": (
        functools.partial(sj.sde_dpm_solver_pp, solver_type="midpoint"),
        1,
        "curvature",
    ),
    "UniPC": (sj.unipc, 1, "quadratic"),
    "UniPC, learned grid": (sj.unipc, 1, "curvature"),
}
# Those that choose their steps, each with the evaluations that it takes at once.
COUNTED = {
    f"adaptive, tolerance {rtol}": (functools.partial(sj.adaptive_sde, rtol=rtol), 1) for rtol in (0.5, 0.1, 0.02)
}
COUNTED |= {f"Picard, {n} steps": (functools.partial(sj.picard, num_points=n), n) for n in (20, 50, 100)}


@functools.cache
def _law() -> tuple[np.ndarray, np.ndarray]:
    """The mixture's mass in each cell, and the transform of the distance."""
    n = round(2 * HALF / CELL) + 1
    at = np.linspace(-HALF, HALF, n)
    points = np.stack(np.meshgrid(at, at, indexing="ij"), axis=-1)
    mass = np.concatenate(
        [np.exp(MIXTURE.log_prob(jnp.asarray(rows, jnp.float32))) for rows in np.split(points, [n // 2])]
    )
    shift = np.minimum(np.arange(2 * n), 2 * n - np.arange(2 * n)) * CELL
    return mass / mass.sum(), scipy.fft.rfft2(np.hypot(shift[:, None], shift[None]), workers=2)


def energy_distance(x: np.ndarray) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of samples `[n, 2]` and the mixture, times 10,000; NaN unless finite."""
    if not np.isfinite(x).all():
        return float("nan")
    law, kernel = _law()
    n = len(law)
    place = np.clip((np.asarray(x, np.float64) + HALF) / CELL, 0, n - 1.001)
    low = place.astype(int)
    high = place - low
    difference = -law
    for i in (0, 1):
        for j in (0, 1):
            share = np.where(i, high[:, 0], 1 - high[:, 0]) * np.where(j, high[:, 1], 1 - high[:, 1])
            np.add.at(difference, (low[:, 0] + i, low[:, 1] + j), share / len(x))
    potential = scipy.fft.irfft2(kernel * scipy.fft.rfft2(difference, kernel.shape[:1] * 2, workers=2), workers=2)
    distances = -np.sum(difference * potential[:n, :n])
    own = np.mean(np.hypot(*(x - x[::-1]).T))
    return float(1e4 * (distances - own / len(x)))


def runs(sde, score_fn, x):
    """For each sampler and budget, `(name, evaluations, samples)` from the states x at t_max."""
    for name, (make, cost, grid) in SAMPLERS.items():
        run = jax.jit(lambda key, x, ts, make=make: sj.sample(key, make(sde, score_fn), x, ts))
        for budget in BUDGETS:
            n = budget // cost
            if grid == "curvature":
                ts = jax.jit(timesteps.curvature, static_argnums=(1, 3))(sde, score_fn, x[:256], n)
            else:
                ts = getattr(timesteps, grid)(sde, n)
            yield name, budget, np.asarray(run(jax.random.key(1), x, ts))


def counted(sde, score_fn, x, error):
    """For each of `COUNTED` its evaluations one after the other, all of them, and the error; printed as they come."""
    table, ts = {}, jnp.array([sde.t_max, sde.t_min])
    print("\n| | one after the other | all | error |\n|---|---:|---:|---:|", flush=True)
    for name, (make, width) in COUNTED.items():
        calls = []

        def counting(x, t, calls=calls):
            jax.debug.callback(lambda _: calls.append(1), jnp.mean(t))
            return score_fn(x, t)

        sampler = make(sde, counting)
        run = jax.jit(lambda key, x, sampler=sampler: sj.sample(key, sampler, x, ts))
        samples = np.asarray(run(jax.random.key(1), x))
        jax.effects_barrier()
        row = {"one after the other": len(calls) // width, "all": len(calls), "error": round(error(samples), 3)}
        table[name] = row
        print(f"| {name} | " + " | ".join(f"{value:.4g}" for value in row.values()) + " |", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, help="of a trained configs/vp_digits.py")
    parser.add_argument("--diffusers", action="store_true")
    parser.add_argument("--json", type=pathlib.Path, default="benchmarks/solvers.json")
    arguments = parser.parse_args()
    train.tune_cpu()

    result: dict = {"jax": jax.__version__}
    problems = {"mixture": mixture()} | ({"digits": digits(arguments.workdir)} if arguments.workdir else {})
    for name, (sde, score_fn, x, error) in problems.items():
        rows = ((sampler, budget, error(samples)) for sampler, budget, samples in runs(sde, score_fn, x))
        result[name] = tabulate(f"{name}: {error.__name__}", rows)
        result[f"{name}, counted"] = counted(sde, score_fn, x, error)
    if arguments.diffusers:
        result["mixture, diffusers"] = tabulate("diffusers, default options", diffusers())
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def tabulate(title, results):
    """Print `(name, evaluations, error)` as they come, a line a name, and return them as a table."""
    print(f"\n| {title:33} |" + "".join(f" {b:10} |" for b in BUDGETS) + "\n|---|" + "---:|" * len(BUDGETS), flush=True)
    table = {}
    for name, row in itertools.groupby(results, key=lambda result: result[0]):
        table[name] = {str(budget): round(error, 3) for _, budget, error in row}
        print(f"| {name:33} |" + "".join(f" {error:10.4g} |" for error in table[name].values()), flush=True)
    return table


def mixture():
    """The process, the score, states at t_max and the error of samples."""
    sde = sj.DDPM()
    x = MIXTURE.marginal(sde, sde.t_max).sample(jax.random.key(0), NUM_SAMPLES)
    return sde, MIXTURE.score_fn(sde), x, energy_distance


def digits(workdir: pathlib.Path):
    """The same of the model in a directory."""
    import yaml
    from ml_collections import ConfigDict

    from score_jax import build, context, data, metrics

    run = context.Run(ConfigDict(yaml.safe_load((workdir / "config.yaml").read_text())), workdir)
    sde = run.sampling_sde
    score_fn = build.make_score_fn(run.config, sde, run.network, run.restore()[1].ema)

    def features(images: np.ndarray) -> np.ndarray:
        return data.to_float(images, centered=True).reshape(len(images), -1)

    datasets = run.dataset, build.open_data(run.config, "test")
    real = features(np.concatenate([d.read(np.arange(d.size))[0] for d in datasets]))

    def frechet_distance(samples: np.ndarray) -> float:
        if not np.isfinite(samples).all():
            return float("nan")
        return metrics.frechet_distance(features(data.to_uint8(samples, centered=True)), real)

    return sde, score_fn, sj.sample_prior(jax.random.key(0), sde, (1024, *run.dataset.shape)), frechet_distance


def diffusers():
    """diffusers' schedulers with their default options, on the same chain, score and starts."""
    import diffusers as library
    import torch

    sde = sj.DDPM()
    score_fn = MIXTURE.score_fn(sde)
    eps = jax.jit(lambda x, k: -sde.sigma((k + 1) / 1000) * score_fn(x, (k + 1) / 1000))
    start = np.asarray(MIXTURE.marginal(sde, sde.t_max).sample(jax.random.key(0), NUM_SAMPLES))
    chain = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    for name in ("DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "SASolver", "UniPCMultistep"):
        # The defaults clip to the range of images.
        options = {"clip_sample": False} if name in ("DDIM", "DDPM") else {}
        for budget in BUDGETS:
            torch.manual_seed(0)
            try:
                scheduler = getattr(library, f"{name}Scheduler")(**chain, **options)
                scheduler.set_timesteps(budget)
                x = torch.from_numpy(start.copy()) * float(scheduler.init_noise_sigma)
                for k in scheduler.timesteps:
                    scaled = scheduler.scale_model_input(x, k)
                    out = torch.from_numpy(np.array(eps(jnp.asarray(scaled.numpy()), float(k))))
                    x = scheduler.step(out, k, x).prev_sample
                yield name, budget, energy_distance(x.numpy())
            except Exception as error:  # Another library's limits end a row, not the table.
                print(f"{name} at {budget}: {type(error).__name__}: {error}")
                yield name, budget, float("nan")


if __name__ == "__main__":
    main()
