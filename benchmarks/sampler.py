"""What the sampling loop costs beyond its network: `python -m benchmarks.sampler [--steps=1000]`.

The ratio of one scanned run of n DDIM steps to n calls of the jitted network, alternated.  The
network is the digits U-Net at batch 64.
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

import score_jax as sj
from score_jax import timesteps, train
from score_jax.networks import UNet


def seconds(fn) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, default="benchmarks/sampler.json")
    arguments = parser.parse_args()
    train.tune_cpu()

    sde, network = sj.VP(), UNet(features=16, multipliers=(1, 2), num_blocks=1, attention_at=())
    x, cond = jax.random.normal(jax.random.key(0), (64, 8, 8, 1)), jnp.ones(64)
    params = jax.jit(network.init)(jax.random.key(0), x, cond)
    apply = jax.jit(network.apply)

    @jax.jit
    def scanned(params, x):
        score_fn = sj.from_noise(sde, lambda x, t: network.apply(params, x, jnp.broadcast_to(999 * t, x.shape[:1])))
        return sj.sample(jax.random.key(0), sj.ddim(sde, score_fn), x, timesteps.uniform(sde, arguments.steps))

    def called():
        for _ in range(arguments.steps):
            out = apply(params, x, cond)
        return out

    runs = {"scanned": lambda: scanned(params, x), "called": called}
    for fn in runs.values():
        seconds(fn)
    times = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, fn in runs.items():
            times[name].append(seconds(fn))
    ratios = [a / b for a, b in zip(times["scanned"], times["called"], strict=True)]
    result = {
        "steps": arguments.steps,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "ms_a_network_call": 1e3 * statistics.median(times["called"]) / arguments.steps,
        "jax": jax.__version__,
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{arguments.steps} scanned steps / {arguments.steps} network calls: {result['ratio']:.3f}  (runs: "
        + ", ".join(f"{r:.3f}" for r in ratios)
        + f"; {result['ms_a_network_call']:.2f} ms a call)"
    )


if __name__ == "__main__":
    main()
