"""Compile time and the time to the first samples, in processes of their own, without and with the persistent cache.

`python -m benchmarks.startup gradient` compiles the gradient of DDPM++'s loss, `samples` draws 64 digits by the default
sampler; each prints its seconds: of the gradient those of tracing and lowering too, of the samples all from the start
of Python's own code on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

START = time.perf_counter()


def measure() -> dict[str, dict[str, float]]:
    """Each twice with one new cache."""
    rows: dict[str, dict[str, float]] = {}
    for what in ("gradient", "samples"):
        with tempfile.TemporaryDirectory() as directory:
            # JAX by itself does not keep what compiles in less than a second.
            settings = {"JAX_COMPILATION_CACHE_DIR": directory, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            command = [sys.executable, "-m", "benchmarks.startup", what]
            cold, warm = (
                json.loads(
                    subprocess.run(command, env=os.environ | settings, check=True, stdout=subprocess.PIPE).stdout
                )
                for _ in range(2)
            )
        rows |= {n: {"cold, s": cold[n], "warm, s": warm[n], "warm / cold": warm[n] / cold[n]} for n in cold}
    return rows


def gradient() -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from benchmarks import subjects

    it = subjects.SUBJECTS[subjects.DDPMPP]()
    batch = {"x": jnp.zeros(it.shape), "y": jnp.zeros(it.shape[0], jnp.int32)}
    start = time.perf_counter()
    lowered = jax.jit(jax.value_and_grad(it.loss_fn)).lower(it.state.params, jax.random.key(0), batch)
    between = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    return {"gradient, compiled": end - between, "gradient, traced and compiled": end - start}


def samples() -> dict[str, float]:
    import score_jax as sj
    from benchmarks import sampling, subjects

    it = subjects.SUBJECTS[subjects.DIGITS_UNET]()
    score_fn = sj.from_noise(sampling.SDE, sampling.noise(it.network, it.state.params))
    sampling.sampled(sj.sde_dpm_solver_pp, score_fn, 20)(sampling.X).block_until_ready()
    return {"samples": time.perf_counter() - START}


if __name__ == "__main__":
    parts = {"gradient": gradient, "samples": samples}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    part = parser.parse_args().part
    from score_jax import train

    train.tune_cpu()
    print(json.dumps(parts[part]()))
