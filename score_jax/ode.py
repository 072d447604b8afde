"""The probability-flow ODE with adaptive steps: from noise to data and back, one to one.

The ODE (Song et al. 2021, Eq. 13; `sde`, Eq. 6) has the marginals of the process,

    dx/dt = f x - g^2/2 score(x, t).                                        (1)

A batch shares its steps.  A step is accepted when the error of every example, root mean square over its
dimensions and relative to  atol + rtol |z|,  is below one: no average over the batch hides a bad example.

The state at t_max is the data's latent code (`ode_encode`, then `ode_sample` back).  Codes have norms near
sigma sqrt(d), and so have the points between two of them at an angle theta (White 2016),

    a sin((1 - w) theta) / sin(theta) + b sin(w theta) / sin(theta).        (2)
"""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jax import Array

from score_jax.batches import as_batch, as_floating, as_precise, dot, expand, square
from score_jax.sde import SDE, ScoreFn, probability_flow_drift

__all__ = ["SolverError", "ode_encode", "ode_sample", "ode_solve", "spherical"]


class SolverError(RuntimeError):
    """The solver stopped before the end."""


# Each with its evaluations a step: the last stage of an accepted step is the first of the next.
SOLVERS = {"tsit5": (diffrax.Tsit5, 6), "dopri5": (diffrax.Dopri5, 6), "dopri8": (diffrax.Dopri8, 13)}


def ode_sample(
    sde: SDE,
    score_fn: ScoreFn,
    x: Array,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    solver: str = "tsit5",
    max_steps: int = 4096,
) -> Array:
    """Follow the probability flow from t_max to t_min, the inverse of `ode_encode`; there is no denoising step.

    Args:
      sde: the process.
      score_fn: `score_fn(x, t)`, rows independent; t is a scalar.
      x: the state at t_max, `[batch, *event]`; usually `sample_prior`.
      rtol: relative tolerance of a step.
      atol: absolute tolerance of a step, in the units of the data.
      solver: `tsit5`, `dopri5` (both of order 5) or `dopri8` (of order 8).
      max_steps: steps, rejected ones included, after which to give up.

    Returns:
      The state at t_min, in the shape of `x`.

    Raises:
      ValueError: if a tolerance is not positive or there is no such solver.
      SolverError: if the solver stops early, saying where; under `jit` the result is NaN instead.
    """
    times = sde.t_max, sde.t_min
    return ode_solve(sde, score_fn, x, *times, rtol=rtol, atol=atol, solver=solver, max_steps=max_steps)[0]


def ode_encode(
    sde: SDE,
    score_fn: ScoreFn,
    x: Array,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    solver: str = "tsit5",
    max_steps: int = 4096,
) -> Array:
    """Follow the probability flow from t_min to t_max, where data has become its latent code.

    Args and errors are those of `ode_sample`, but for `x`, the state at t_min.

    Returns:
      The state at t_max, in the shape of `x`.
    """
    times = sde.t_min, sde.t_max
    return ode_solve(sde, score_fn, x, *times, rtol=rtol, atol=atol, solver=solver, max_steps=max_steps)[0]


def spherical(a: Array, b: Array, weight: float | Array) -> Array:
    """The latent code between two, on the great circle through them (Eq. 2).

    Args:
      a: codes, `[batch, *event]`, the result at weight 0.
      b: codes in the shape of `a`, the result at weight 1.
      weight: scalar or `[batch]`.
    """
    a, b = as_batch(a, "a"), as_batch(b, "b")
    cosine = dot(a, b) / jnp.sqrt(square(a) * square(b))
    theta = jnp.arccos(jnp.clip(cosine, -1, 1))
    # Where a and b agree the straight line does.
    near = theta < 1e-3
    sine = jnp.where(near, 1.0, jnp.sin(theta))
    shares = (jnp.where(near, w, jnp.sin(w * theta) / sine) for w in (1 - jnp.asarray(weight), jnp.asarray(weight)))
    first, second = (expand(jnp.broadcast_to(share, len(a)), a) for share in shares)
    return first * a + second * b


def ode_solve(
    sde: SDE,
    score_fn: ScoreFn,
    x: Array,
    t: float | Array,
    s: float | Array,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    solver: str = "tsit5",
    max_steps: int = 4096,
) -> tuple[Array, Array]:
    """Follow the probability flow from time t to time s, either of which may be the later.

    Args and errors are those of `ode_sample`, but for the scalar times `t` and `s`.

    Returns:
      `(x_s, num_evaluations)`: the state at `s` in the shape of `x`, and how often the score was evaluated on
      the batch.
    """
    x = as_floating(x)
    return integrate(_flow, (sde, score_fn), x, t, s, rtol=rtol, atol=atol, solver=solver, max_steps=max_steps)


def _flow(t: Array, x: Array, args: tuple[SDE, ScoreFn]) -> Array:
    return probability_flow_drift(*args, x, t).astype(x.dtype)


def integrate(
    field: Callable[[Any, Any, Any], Any],
    args: Any,
    state: Any,
    t: float | Array,
    s: float | Array,
    *,
    rtol: float | Array,
    atol: float | Array,
    solver: str,
    max_steps: int,
) -> tuple[Any, Array]:
    """Solve d state/dt = field(t, state, args) from t to s with adaptive steps shared by a batch.

    A second call with the same shapes compiles nothing, whatever the times and the tolerances, as long as `field`
    and the functions in `args` are the same objects.

    Args:
      field: a module-level function.
      args: a pytree of arrays, numbers and functions.
      state: a pytree of `[batch, ...]`; the errors of its leaves count alike.
      t: where to start, a scalar.
      s: where to end, a scalar.
      rtol: and the rest as in `ode_sample`.

    Returns:
      `(state at s, number of evaluations of field)`.
    """
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if isinstance(tolerance, int | float) and not tolerance > 0:
            raise ValueError(f"{name} must be positive, got {tolerance}")
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: choose one of {', '.join(map(repr, SOLVERS))}")
    method, stages = SOLVERS[solver]
    # Python's numbers would be compiled in, and arrays that are like them (weakly typed) compile anew.
    t, s, rtol, atol = (as_precise(value, jax.tree.leaves(state)[0]) for value in (t, s, rtol, atol))
    state = jax.tree.map(lambda y: as_precise(y, y), state)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        method(),
        t,
        s,
        (s - t) / 100,
        state,
        args,
        # A step so short means that the field is not finite; without a bound it would shrink until max_steps.
        stepsize_controller=diffrax.PIDController(
            rtol, atol, norm=_worst, dtmin=1e-10 * jnp.abs(s - t), force_dtmin=False
        ),
        max_steps=max_steps,
        throw=False,
    )
    done = solution.result == diffrax.RESULTS.successful
    _check_done(done, solution.ts[0], solution.stats["num_steps"], max_steps)
    result = jax.tree.map(lambda y: jnp.where(done, y[0], jnp.nan), solution.ys)
    return result, 1 + stages * solution.stats["num_steps"]


def _check_done(done: Array, t: Array, num_steps: Array, max_steps: int) -> None:
    """Raise a `SolverError` if the solver stopped before the end; traced values pass."""
    if isinstance(done, jax.core.Tracer) or done:
        return
    if num_steps >= max_steps:
        raise SolverError(
            f"the ODE solver reached max_steps={max_steps} at t = {t:.3g}: loosen rtol and atol, or raise max_steps"
        )
    raise SolverError(f"the ODE solver found no step that works at t = {t:.3g}: are x and the score finite there?")


def _worst(error: Any) -> Array:
    """The largest error of an example, root mean square over its dimensions, in any part of the state."""
    parts = [jnp.sqrt(jnp.mean(e**2, axis=range(1, e.ndim))) for e in jax.tree.leaves(error)]
    return jnp.max(jnp.stack(parts), initial=0.0)  # Of an empty batch there is no error.
