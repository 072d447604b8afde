"""Memory of the gradient of the CIFAR-10 networks, and what `remat` and bfloat16 leave of it.

The temporary memory that the compiled gradient of the squared output asks for, as XLA counts it, at a batch of 16,
which on CPU is mostly activations.

    python -m benchmarks.networks [--json PATH]
"""

import argparse
import json
import pathlib

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
    print("| network | plain, GiB | remat | bfloat16 | both |\n|---|---:|---:|---:|---:|", flush=True)
    for name, network in NETWORKS.items():
        plain = memory(network)
        options = {"remat": {"remat": True}, "bfloat16": {"dtype": "bfloat16"}}
        ratios = {k: memory(network.clone(**v)) / plain for k, v in options.items()}
        ratios["both"] = memory(network.clone(remat=True, dtype="bfloat16")) / plain
        result[name] = {"plain_gib": round(plain, 3)} | {k: round(v, 3) for k, v in ratios.items()}
        print(f"| {name} | {plain:.2f} |" + "".join(f" {v:.2f} |" for v in ratios.values()), flush=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
