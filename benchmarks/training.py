"""Training beyond the gradient, and the pipeline that feeds it."""

import pathlib
import tempfile

import jax
import jax.numpy as jnp

from benchmarks import subjects
from benchmarks.timing import alternate, ratio
from score_jax import train
from score_jax.log import MetricLog


def overhead(it: subjects.Subject, steps: int, rounds: int) -> dict[str, float]:
    """Steps by themselves, and in `train.fit` with the pipeline and the log of a run, against the bare gradient."""
    state, params, key = jax.tree.map(jnp.copy, it.state), it.state.params, jax.random.key(0)
    batches = subjects.batches(it.shape)
    batch, gradient = next(batches), jax.jit(jax.value_and_grad(it.loss_fn))

    def bare():
        for _ in range(steps):
            # Gradients do not depend on one another, and would overlap.
            jax.block_until_ready(gradient(params, key, batch))

    def fitted():
        nonlocal state
        until = int(state.step) + steps
        arguments = dict(num_steps=until, log_every=steps, checkpoint_every=until, save=lambda *_: None)
        state = train.fit(it.step, state, key, batches, log=log, **arguments)
        return state

    logged, stepped = (rounds + 1) * steps, subjects.stepping(it, batch, steps)
    with tempfile.TemporaryDirectory() as path, MetricLog(pathlib.Path(path), start=0, num_steps=logged) as log:
        times = alternate({"gradient": bare, "step": stepped, "fit": fitted}, rounds)
    return {f"{run} / gradient": ratio(times, run, "gradient") for run in ("step", "fit")}


def pipeline(it: subjects.Subject, steps: int, rounds: int) -> dict[str, float]:
    """Batches of CIFAR-10's shape that the pipeline makes in the time of one training step on digits."""
    images = subjects.batches((it.shape[0], 32, 32, 3))

    def read():
        for _ in range(steps):
            next(images)

    stepped = subjects.stepping(it, next(subjects.batches(it.shape)), steps)
    times = alternate({"step": stepped, "batch": read}, rounds)
    return {"batches a step": ratio(times, "step", "batch")}
