"""What a sampler is, and the one loop that runs any of them.

A sampler is a pair of functions.  `step` moves a batch from time t down to time s < t; what
it must remember between steps (the history of a multistep method, say) is its state, which
`init` makes.  A sampler is built from `(sde, score_fn)` by a function of that name.  It
holds closures, so build it inside the function that is jitted: closures hash by identity,
and a sampler passed as a static argument recompiles on every call.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from score_jax.batches import as_floating, as_precise

__all__ = ["Sampler", "chain", "sample"]

State = Any


class Sampler(NamedTuple):
    """A sampling method as two pure functions.

    Attributes:
      init: `init(x, t) -> state`, the state before the first step from `x` (`[batch, *event]`)
        at the scalar time `t`.
      step: `step(key, x, t, s, state) -> (x_s, state)`, one step from time `t` to `s < t`, both
        scalars.  A corrector leaves the time alone: it acts at `s`, where the predictor before
        it has arrived.
    """

    init: Callable[[Array, Array], State]
    step: Callable[[Array, Array, Array, Array, State], tuple[Array, State]]


def no_state(x: Array, t: Array) -> State:
    """The `init` of a sampler that remembers nothing."""
    return ()


def root(a: Array) -> Array:
    """The square root, but for its gradient at 0, which is 0: noise that is not there does not depend on anything."""
    return jnp.where(a == 0, 0.0, jnp.sqrt(jnp.where(a == 0, 1.0, a)))


def chain(*samplers: Sampler) -> Sampler:
    """Samplers applied one after the other in every step: a predictor, then correctors.

    (Song et al. 2021, Algorithm 1.)  Each is called with the same `t` and `s`, its own key and
    its own state.
    """

    def init(x: Array, t: Array) -> State:
        return tuple(sampler.init(x, t) for sampler in samplers)

    def step(key: Array, x: Array, t: Array, s: Array, state: State) -> tuple[Array, State]:
        states = []
        for k, sampler, old in zip(jax.random.split(key, len(samplers)), samplers, state, strict=True):
            x, new = sampler.step(k, x, t, s, old)
            states.append(new)
        return x, tuple(states)

    return Sampler(init, step)


def sample(
    key: Array, sampler: Sampler, x: Array, ts: ArrayLike | Sequence[float], *, trajectory: bool = False
) -> Array:
    """Run a sampler along a grid of times, as one `lax.scan`.

    Args:
      key: a PRNG key, split into one for each step.
      sampler: the method.
      x: the state at `ts[0]`, `[batch, *event]`; usually `sample_prior`.
      ts: `[n + 1]` decreasing times, see `score_jax.timesteps`.  A step from a time to itself changes nothing, but for
        correctors, `stochastic_heun` and `consistency`, which draw noise there.
      trajectory: return every state instead of the last.

    Returns:
      The state at `ts[-1]`, in the shape and the precision of `x`, float32 at least; with `trajectory`, the states at
      all of `ts`, `[n + 1, batch, *event]`.

    Raises:
      ValueError: if `ts` is not a vector of at least two times, or, outside `jit`, increases; if x is not floating
        point, or the score has not its shape.
      FloatingPointError: if the states are not finite, naming the step; under `jit` they are returned as they are.
    """
    x = as_floating(x)
    ts = as_precise(ts, x)
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(f"ts must be a vector of at least 2 times, but has shape {ts.shape}")

    concrete = not isinstance(ts, jax.core.Tracer)
    times = np.asarray(ts) if concrete else ts  # In numpy: under `jit` even constants would be traced.
    if concrete and np.any(np.diff(times) > 0):
        raise ValueError("ts must not increase: a sampler goes from noise to data, and `ode_encode` the other way")

    def body(carry, inputs):
        k, t, s = inputs
        x, state = sampler.step(k, carry[0], t, s, carry[1])
        return (x, state), (jnp.isfinite(x).all(), x if trajectory else None)

    keys = jax.random.split(key, len(ts) - 1)
    (last, _), (finite, visited) = jax.lax.scan(body, (x, sampler.init(x, ts[0])), (keys, ts[:-1], ts[1:]))
    advice = "take more steps or another sampler"
    if concrete and not times[-1] > 0:
        advice = "the times should be above 0"
    check_finite(finite, "step", advice=advice)
    return jnp.concatenate([x[None], visited]) if trajectory else last


def check_finite(finite: Array, *axes: str, advice: str) -> None:
    """Raise a `FloatingPointError` that names the first step whose states were not finite; traced values pass.

    Args:
      finite: whether the states were finite after each step, one axis for each name.
      *axes: what the axes count, `'level', 'step'` say.
      advice: what would be right.
    """
    if isinstance(finite, jax.core.Tracer) or finite.all():
        return
    first = jnp.argwhere(~finite)[0]
    where = ", ".join(f"{name} {i + 1} of {n}" for name, i, n in zip(axes, first, finite.shape, strict=True))
    raise FloatingPointError(f"the samples are not finite after {where}: {advice}")
