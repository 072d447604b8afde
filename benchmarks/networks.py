"""Memory of the gradient of the CIFAR-10 networks, and what `remat` leaves of it.

The temporary memory that the compiled gradient of the squared output asks for, as XLA counts it, at a batch of 16:
mostly activations.  XLA's CPU backend by itself removes the barriers that keep what is computed again apart from the
first time, merges the two, and saves nothing; here it is told to keep them, as backends of accelerators do.

    python -m benchmarks.networks [--json PATH]
"""

import argparse
import json
import os
import pathlib

os.environ["XLA_FLAGS"] = f"--xla_disable_hlo_passes=cse_barrier_expander {os.environ.get('XLA_FLAGS', '')}"

import jax
import jax.numpy as jnp

from score_jax.networks import NCSNpp, UNet

BATCH = 16
NETWORKS = {
    "DDPM": UNet(resample="conv", rescale=False, groups=32),
    "DDPM++": NCSNpp(),
    "NCSN++": NCSNpp(
        embedding="gaussian_fourier", taps=(1, 3, 3, 1), progressive_input="residual", scale_by_sigma=True
    ),
}


def memory(network) -> float:
    """In GiB."""
    x, cond = jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.float32), jax.ShapeDtypeStruct((BATCH,), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), x, cond)
    gradient = jax.jit(jax.grad(lambda params, x, cond: jnp.mean(network.apply(params, x, cond) ** 2)))
    return gradient.lower(params, x, cond).compile().memory_analysis().temp_size_in_bytes / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    result = {}
    print("| network | plain, GiB | remat, GiB | ratio |\n|---|---:|---:|---:|", flush=True)
    for name, network in NETWORKS.items():
        plain, again = memory(network), memory(network.clone(remat=True))
        result[name] = {"plain_gib": round(plain, 3), "remat_gib": round(again, 3), "ratio": round(again / plain, 3)}
        print(f"| {name} | {plain:.2f} | {again:.2f} | {again / plain:.2f} |", flush=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
