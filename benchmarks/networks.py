"""Networks: the forward pass and the training step against a matrix product, and against torch.

Utilization is the share of the matrix product's rate at which the operations run that the network as published asks
for (`cost_analysis`, before XLA changes anything; convolutions by direct sums, so that it can be above 1 on CPU, where
`convolution` needs fewer).
"""

from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import subjects
from benchmarks.timing import alternate, ratio


def measure(it: subjects.Subject, product, rounds: int, *, torch: bool = False) -> dict[str, float]:
    """The row of a subject; `product` is `timing.matmul(...)`."""
    x, cond, key = jax.random.normal(jax.random.key(2), it.shape), jnp.full(it.shape[0], 0.5), jax.random.key(3)
    batch = {"x": x, "y": jnp.zeros(it.shape[0], jnp.int32)}
    forward = jax.jit(it.network.apply)
    params = it.state.params
    with mock.patch("jax.default_backend", return_value="none"):
        lowered = {"forward": forward.lower(params, x, cond), "step": it.step.lower(it.state, key, batch)}
    jax.clear_caches()
    operations = {run: lower.cost_analysis()["flops"] for run, lower in lowered.items()}

    runs = {"matmul": product[0], "forward": lambda: forward(params, x, cond), "step": subjects.stepping(it, batch)}
    if torch:
        from benchmarks import peer

        gradient = jax.jit(jax.grad(lambda params: jnp.mean(it.network.apply(params, x, cond) ** 2)))
        runs |= {"gradient": lambda: gradient(params)}
        runs |= peer.runs(it.network, params, x, cond, forward(params, x, cond))
    times = alternate(runs, rounds)
    row = {f"GFLOP, {run}": flops / 1e9 for run, flops in operations.items()}
    row |= {
        f"utilization, {run}": flops / product[1] / ratio(times, run, "matmul") for run, flops in operations.items()
    }
    if torch:
        row |= {f"{run} / torch's": ratio(times, run, f"torch {run}") for run in ("forward", "gradient")}
    return row
