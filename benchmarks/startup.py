"""Compile time and the time to the first samples, in processes of their own, without and with the persistent cache.

`python -m benchmarks.startup gradient` compiles the gradient of DDPM++'s loss, `samples` draws 64 digits by the default
sampler; each prints its seconds, the samples' from the start of Python's own code on.
"""

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
            out = [
                subprocess.run(command, env=os.environ | settings, check=True, stdout=subprocess.PIPE, text=True).stdout
                for _ in range(2)
            ]
        cold, warm = (float(text.split()[-1]) for text in out)
        rows[what] = {"cold, s": cold, "warm, s": warm, "warm / cold": warm / cold}
    return rows


def gradient() -> float:
    import jax
    import jax.numpy as jnp

    from benchmarks import subjects

    it = subjects.SUBJECTS[subjects.DDPMPP]()
    batch = {"x": jnp.zeros(it.shape), "y": jnp.zeros(it.shape[0], jnp.int32)}
    start = time.perf_counter()
    jax.jit(jax.value_and_grad(it.loss_fn)).lower(it.state.params, jax.random.key(0), batch).compile()
    return time.perf_counter() - start


def samples() -> float:
    import score_jax as sj
    from benchmarks import sampling, subjects

    it = subjects.SUBJECTS[subjects.DIGITS_UNET]()
    score_fn = sj.from_noise(sampling.SDE, sampling.noise(it.network, it.state.params))
    sampling.sampled(sj.sde_dpm_solver_pp, score_fn, 20)(sampling.X).block_until_ready()
    return time.perf_counter() - START


if __name__ == "__main__":
    from score_jax import train

    train.tune_cpu()
    print({"gradient": gradient, "samples": samples}[sys.argv[1]]())
