"""Speed and memory, each as a ratio to a baseline of the same run: `python -m benchmarks [--torch]`.

Writes `benchmarks.json` and `benchmarks.md` beside this file, in under 15 minutes on two cores.  Times alternate
with their baseline's, and medians are kept (`timing`).  `--torch` sets torch's networks beside ours (`peer`).
"""

import argparse
import json
import os
import pathlib
import platform
import tempfile
import time

# Torch's threads wait actively, which on a machine with other work costs them many times what they do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax
import jax.numpy as jnp

from score_jax import train

HERE = pathlib.Path(__file__).parent
TITLES = {
    "networks": "Networks: share of the matrix product's rate, and time over torch's",
    "accelerator": "Networks in bfloat16: share of the bfloat16 matrix product's rate",
    "training": "Training: time over the bare gradient's",
    "sampling": "Sampling in 1,000 steps (100 with corrector or guidance): time over that of the bare network",
    "likelihood": "Likelihood: time over that of Jacobian-vector products",
    "startup": "Compilation of DDPM++'s gradient, and the first samples of digits",
    "memory": "Peak memory of DDPM++'s training step, over parameters + average + Adam + gradient",
    "pipeline": "Input pipeline: batches of CIFAR-10's shape in the time of a training step on digits",
}


def machine() -> dict[str, float]:
    """The rates that everything else is held against."""
    from benchmarks.timing import alternate, matmul

    wide = jnp.ones(2**26)
    copy = jax.jit(jnp.negative)
    single, half = matmul(), matmul(jnp.bfloat16)
    times = alternate({"single": single[0], "half": half[0], "copy": lambda: copy(wide)}, 3)
    best = {name: min(seconds) for name, seconds in times.items()}
    return {
        "float32 matrix product, GFLOP/s": single[1] / best["single"] / 1e9,
        "bfloat16 matrix product, GFLOP/s": half[1] / best["half"] / 1e9,
        "copy, read and written, GB/s": 2 * wide.nbytes / best["copy"] / 1e9,
    }


def sections(torch: bool):
    """The name and the rows of each, as they are done."""
    from benchmarks import memory, networks, sampling, startup, subjects, training
    from benchmarks.timing import matmul

    digits, ddpmpp = subjects.DIGITS_UNET, subjects.DDPMPP
    make = subjects.SUBJECTS
    peers = (digits, ddpmpp) if torch else ()
    product = matmul()
    yield "networks", {name: networks.measure(it(), product, 2, torch=name in peers) for name, it in make.items()}
    if jax.default_backend() == "cpu":
        yield "accelerator", "not measured"
    else:
        large = matmul(jnp.bfloat16, 8192)
        yield "accelerator", {name: networks.measure(it(), large, 5) for name, it in subjects.LARGE.items()}
    rows = {digits: training.overhead(make[digits](), 100, 5), ddpmpp: training.overhead(make[ddpmpp](), 1, 2)}
    yield "training", rows
    yield "pipeline", {digits: training.pipeline(make[digits](), 100, 3)}
    yield "sampling", {digits: sampling.loop(make[digits](), 1000, 3) | sampling.guidance(make[digits](), 100, 3)}
    yield "likelihood", {digits: sampling.likelihood(make[digits](), 3)}
    yield "startup", startup.measure()
    yield "memory", {"plain": memory.multiple(remat=False), "remat": memory.multiple(remat=True)}


def markdown(result: dict) -> str:
    lines = ["# Benchmarks", "", ", ".join(f"{name}: {value}" for name, value in result["machine"].items()), ""]
    for section, title in TITLES.items():
        lines += [f"## {title}", ""]
        if isinstance(rows := result[section], str):
            lines += [rows, ""]
            continue
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines += ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        for name, row in rows.items():
            lines.append(f"| {name} | " + " | ".join(f"{row[c]:.3g}" if c in row else "" for c in columns) + " |")
        lines.append("")
    return "\n".join([*lines, "Quality against cost: `solvers.json`, from `python -m benchmarks.solvers`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="store_true", help="compare with torch, which must be installed")
    arguments = parser.parse_args()
    train.tune_cpu()
    start = time.perf_counter()
    # The same networks come up in several sections.
    with tempfile.TemporaryDirectory() as directory:
        jax.config.update("jax_compilation_cache_dir", directory)
        about = {"device": jax.devices()[0].device_kind, "processor": platform.machine(), "cores": os.cpu_count()}
        about |= {"python": platform.python_version(), "jax": jax.__version__, "load": os.getloadavg()[0]}
        result: dict = {"machine": about | {k: round(v, 1) for k, v in machine().items()}}
        for section, rows in sections(arguments.torch):
            result[section] = rows
            (HERE / "benchmarks.json").write_text(json.dumps(result, indent=1) + "\n")
            print(f"{time.perf_counter() - start:5.0f} s  {section}: {json.dumps(rows, indent=1)}", flush=True)
    result["machine"]["minutes"] = round((time.perf_counter() - start) / 60, 1)
    result["solvers"] = "benchmarks/solvers.json"
    (HERE / "benchmarks.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "benchmarks.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
