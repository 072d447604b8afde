"""What a training step needs on 8, 64 and 256 devices, on paper: `python -m benchmarks.scaling`.

The step is compiled, not run, for as many fake devices, its parameters divided over groups of 8 (`mesh.fsdp`), in
bfloat16 with `remat`.  From the program: the bytes that a device holds and the bytes that collectives bring to it.
From the network: floating-point operations.  Then for each accelerator the times at its peak of arithmetic and of its
links; a step takes at least the longer one, and as a rule of thumb twice that.

XLA's CPU backend computes bfloat16 in float32, so temporary memory and gathered bytes are up to twice those of an
accelerator.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys

# TFLOP/s in bfloat16, GiB of memory, GB/s of all links of a device in one direction; of their data sheets.
ACCELERATORS = {"TPU v4": (275, 32, 150), "TPU v5e": (197, 16, 100), "H100, NVLink": (989, 80, 450)}
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
FLAGS = "--xla_disable_hlo_passes=cse_barrier_expander --xla_backend_optimization_level=0"


def experiments(devices: int) -> dict:
    """Config by name, with its global batch: as published, or one image a device if that is more."""
    from configs import ve_ffhq_1024, vp_cifar

    ffhq, dit = ve_ffhq_1024.get_config(), vp_cifar.get_config()
    ffhq.training.batch_size = max(ffhq.training.batch_size, devices)
    # DiT-XL/2 on the latent codes of images of 256 pixels.
    dit.network = dict(name="DiT", width=1152, depth=28, heads=16, patch=2, num_classes=1000)
    dit.training.batch_size = 256
    return {"DiT-XL/2, 32x32x4": (dit, (32, 32, 4)), "NCSN++, FFHQ 1024": (ffhq, (1024, 1024, 3))}


def measure(name: str, devices: int) -> dict[str, float]:
    """Of one experiment on as many devices as this process has."""
    import jax
    import jax.numpy as jnp

    from score_jax import build, objective, sharding, train

    config, shape = experiments(devices)[name]
    config.network.update(dtype="bfloat16", remat=True)
    sde, network = build.make_sde(config), build.make_network(config)
    mesh = sharding.make_mesh(data=-1, fsdp=8)
    optimizer = train.make_optimizer(1e-4, num_steps=1000)
    n = config.training.batch_size
    y = jnp.zeros(1, jnp.int32) if build.num_classes(config) else None

    def init() -> train.TrainState:
        return train.init_state(network.init(jax.random.key(0), jnp.zeros((1, *shape)), jnp.ones(1), y), optimizer)

    state = jax.eval_shape(init)
    places = sharding.of_state(mesh, state)
    state = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), state, places)
    place = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.of_batch(mesh))
    batch = {"x": place((n, *shape), jnp.uint8), "y": place((n,), jnp.int32)}
    step = train.make_train_step(
        objective.make_loss(config, sde, network),
        optimizer,
        ema_decay=0.999,
        out_shardings=(places, sharding.replicated(mesh)),
    )
    lowered = step.lower(state, jax.random.key(0), batch)
    compiled = lowered.compile()
    memory, collectives = compiled.memory_analysis(), received(compiled.as_text())
    return {
        "parameters": sum(math.prod(p.shape) for p in jax.tree.leaves(state.params)),
        "batch": n,
        "state_gib": memory.argument_size_in_bytes / 2**30,
        "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "gflop": lowered.cost_analysis()["flops"] / devices / 1e9,
        **{f"{kind}_gb": size / 1e9 for kind, size in collectives.items()},
    }


def received(program: str) -> dict[str, int]:
    """Bytes that the collectives of a compiled program bring to each device, by their kind."""
    total: dict[str, int] = {}
    sizes = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "u8": 1, "pred": 1}
    for shapes, kind in re.findall(rf" = (.*?) ({COLLECTIVES})(?:-start)?\(", program):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            size = sizes.get(dtype, 4) * math.prod(int(d) for d in dims.split(",") if d)
            # A ring passes every byte of a sum twice.
            total[kind] = total.get(kind, 0) + size * (2 if kind == "all-reduce" else 1)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.devices[0])))
        return
    result: dict[str, dict] = {}
    heads = " | ".join(f"{name}: arithmetic, links, ms" for name in ACCELERATORS)
    print(f"| | devices | batch | state, GiB | temporary, GiB | received, GB | {heads} |")
    print("|---|" + "---:|" * (5 + len(ACCELERATORS)))
    for name in experiments(8):
        for devices in arguments.devices:
            flags = f"{FLAGS} --xla_force_host_platform_device_count={devices}"
            command = [sys.executable, "-m", "benchmarks.scaling", f"--measure={name}", "--devices", str(devices)]
            out = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, check=True, capture_output=True)
            row = json.loads(out.stdout.splitlines()[-1])
            result.setdefault(name, {})[str(devices)] = row
            print(as_row(name, devices, row), flush=True)
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def as_row(name: str, devices: int, row: dict[str, float]) -> str:
    links = sum(row.get(f"{kind}_gb", 0.0) for kind in COLLECTIVES.split("|"))
    times = [
        f"{row['gflop'] / peak:.0f}, {1e3 * links / bandwidth:.0f}" for peak, _, bandwidth in ACCELERATORS.values()
    ]
    fits = [row["state_gib"] + row["temporary_gib"] < gib for _, gib, _ in ACCELERATORS.values()]
    cells = [time if fit else f"{time} (does not fit)" for time, fit in zip(times, fits, strict=True)]
    numbers = f"{row['batch']} | {row['state_gib']:.2f} | {row['temporary_gib']:.1f} | {links:.2f}"
    return f"| {name} | {devices} | {numbers} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
