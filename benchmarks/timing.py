"""The one way that times are taken here: runs alternate, and ratios are those of neighbours.

A machine that others share is slow for a while, and then slow for all runs of a round: the median of the rounds'
ratios stays where the times themselves do not.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Times = dict[str, list[float]]


def alternate(runs: dict[str, Callable[[], Any]], rounds: int) -> Times:
    """The seconds of each run in each round, after a first that is not counted."""
    times: Times = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Times, run: str, baseline: str) -> float:
    """How many times as long as the baseline a run takes."""
    return statistics.median(a / b for a, b in zip(times[run], times[baseline], strict=True))


def matmul(dtype: Any = jnp.float32, n: int = 2048) -> tuple[Callable[[], Any], float]:
    """A large matrix product, the arithmetic peak, and its number of operations."""
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a: a @ a)
    return lambda: product(a), 2.0 * n**3
