"""Training: one jitted step, and the loop around it.

A step draws its randomness from `fold_in(key, step)`, so a state and a position in the data
determine everything that follows: a run that is killed and resumed ends where it would have
ended.  The exponential moving average of the parameters (Song & Ermon 2020, Section 3.4),

    ema <- d ema + (1 - d) params,    d = min(ema_decay, (1 + step) / (10 + step)),    (1)

starts as a copy and forgets it by the warm-up of d.  A batch too large for the memory is taken in n equal parts B_k,

    grad L = (1/n) sum_k grad L(B_k),                                         (2)

and a gradient that is not finite leaves all but the count of steps as it was.
"""

import functools
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from score_jax.errors import UserError

__all__ = ["TrainState", "fit", "init_state", "learning_rate", "make_optimizer", "make_train_step", "tune_cpu"]

PyTree = Any
LossFn = Callable[..., Array]


def tune_cpu() -> None:
    """Set three flags of XLA's CPU backend without which training is slower; call it before the first computation.

    The convolutions of its YNN library, the default since JAX 0.10, train small networks 1.3 times slower.  It drops
    optimization barriers before it fuses: without them residual sums are computed over and over
    (`networks.layers.settled`), and what `remat` is to compute again is kept instead.  And it optimises for long what
    runs no faster for it, as networks spend their time in library calls: at LLVM's level 1 large ones compile in three
    quarters of the time.  A flag that the environment sets already is left alone, and so are versions of JAX not known
    to have them, and machines with an accelerator, whose compilers read some of these flags, too.
    """
    # XLA ends the process at a flag that it does not know.
    known = (0, 10) <= jax.__version_info__[:2] <= (0, 12)
    accelerator = importlib.metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu")
    if accelerator or not known:
        return
    for flag, value in (
        ("--xla_cpu_experimental_ynn_fusion_type", ""),
        ("--xla_disable_hlo_passes", "cse_barrier_expander"),
        ("--xla_backend_optimization_level", "1"),
    ):
        flags = os.environ.get("XLA_FLAGS", "")
        if flag not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {flag}={value}".strip()


class TrainState(NamedTuple):
    """All that training changes.

    Attributes:
      step: the number of steps taken, an int32 scalar.
      params: the network's parameters.
      ema: their moving average (Eq. 1), which sampling uses.
      opt_state: the optimizer's state.
      skipped: how many steps in a row, up to this one, changed nothing as their gradient was not finite, int32.
    """

    step: Array
    params: PyTree
    ema: PyTree
    opt_state: PyTree
    skipped: Array


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    # A copy: were the average an alias of the parameters, their buffers could not be donated.
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params), jnp.zeros((), jnp.int32))


def learning_rate(peak: float, *, num_steps: int, warmup_steps: int = 0, decay: str = "constant") -> optax.Schedule:
    """The learning rate by the number of steps taken: it rises linearly, then stays or falls.

    Args:
      peak: the largest.
      num_steps: all steps, the warm-up included.
      warmup_steps: steps from 0 to the peak.
      decay: `constant`, or `cosine` to zero at `num_steps`.

    Raises:
      UserError: if `decay` is neither.
    """
    if decay not in ("constant", "cosine"):
        raise UserError(f"config.training.decay must be 'constant' or 'cosine', got {decay!r}")
    rest = optax.constant_schedule(peak)
    if decay == "cosine":
        rest = optax.cosine_decay_schedule(peak, max(num_steps - warmup_steps, 1))
    # The first step is one of the rise, not a step of length zero.
    rise = optax.linear_schedule(peak / (warmup_steps + 1), peak, max(warmup_steps, 1))
    return optax.join_schedules([rise, rest], [warmup_steps])


def make_optimizer(peak: float, *, grad_clip: float = 1.0, **schedule: Any) -> optax.GradientTransformation:
    """Adam after clipping by the global norm; its state has one structure, whatever the numbers.

    Args:
      peak: the largest learning rate.
      grad_clip: the largest global norm of a gradient.
      **schedule: the other arguments of `learning_rate`.
    """
    return optax.chain(optax.clip_by_global_norm(grad_clip), optax.adam(learning_rate(peak, **schedule)))


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    accumulate: int = 1,
    out_shardings: Any = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """One step of gradient descent and of the moving average, jitted, its state donated.

    A step whose loss or gradient is not finite changes neither parameters nor optimizer, and is counted.

    Args:
      loss_fn: `loss_fn(params, key, batch, *fixed) -> scalar`.
      optimizer: an optax transformation.
      ema_decay: the largest decay in Eq. 1.
      accumulate: into how many parts to divide a batch, one after the other in memory.
      out_shardings: as in `jax.jit`, of the state and of the metrics; those of the state that is passed, so that the
        next step compiles nothing.

    Returns:
      `step(state, key, batch, *fixed) -> (state, {'loss', 'grad_norm'})`; pass the same `key` every time, and as
      `fixed` arrays that the loss needs and training leaves alone, a teacher's parameters say.
    """

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)
    def step(state: TrainState, key: Array, batch: PyTree, *fixed: PyTree) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(key, state.step)
        loss, grads = _gradient(lambda *varying: loss_fn(*varying, *fixed), accumulate, state.params, key, batch)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        finite = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        after, before = (optax.apply_updates(state.params, updates), opt_state), (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
        decay = jnp.where(finite, jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step)), 1.0)
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        return TrainState(state.step + 1, params, ema, opt_state, skipped), metrics

    return step


def _gradient(loss_fn: LossFn, accumulate: int, params: PyTree, key: Array, batch: PyTree) -> tuple[Array, PyTree]:
    """The loss and its gradient, over a batch in `accumulate` parts (Eq. 2)."""
    gradient = jax.value_and_grad(loss_fn)
    if accumulate == 1:
        return gradient(params, key, batch)

    def add(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, gradient(params, *part)), None

    # A part is every n-th example, so that all devices have a share of it.
    parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
    keys = jax.random.split(key, accumulate)
    # XLA's CPU backend is tens of times slower at the gradient of a convolution within a loop.
    total, _ = jax.lax.scan(add, zeros, (keys, parts), unroll=jax.default_backend() == "cpu")
    return jax.tree.map(lambda x: x / accumulate, total)


def fit(
    train_step: Callable,
    state: TrainState,
    key: Array,
    batches: Iterator[PyTree],
    *,
    num_steps: int,
    log_every: int,
    checkpoint_every: int,
    log: Callable[[int, dict[str, float]], None],
    save: Callable[[int, TrainState], None],
    max_skipped: int = 0,
    stopped: Callable[[int], bool] = lambda step: False,
) -> TrainState:
    """Train up to `num_steps`, from wherever `state` stands, or until it is stopped.

    The host waits for the device only where it logs or saves.  The metrics logged are means over
    the steps since, but for those that were skipped; beside them `loss_max`, the largest loss, where
    a spike shows, and `skipped`, the number of steps with a gradient that was not finite.

    Args:
      train_step: from `make_train_step`.
      state: donated.
      key: the key of all steps.
      batches: an iterator that stands at the batch after the state's last.
      num_steps: the step to reach.
      log_every: steps between calls of `log`.
      checkpoint_every: steps between calls of `save`, which is called after the last step, too; after a step that was
        skipped it waits for one that was not, as the parameters may be what the gradient fails at.
      log: `log(step, metrics)`.
      save: `save(step, state)`.
      max_skipped: how many steps in a row may be skipped.
      stopped: asked after every step, with its number; once it is true the state is saved and training ends.

    Raises:
      UserError: when more steps in a row were skipped; nothing of them is saved.
    """
    seen: list[dict[str, Array]] = []
    since, start = time.perf_counter(), int(state.step)
    saves = stopping = False
    for step in range(start + 1, num_steps + 1):
        state, metrics = train_step(state, key, next(batches))
        seen.append(metrics)
        stopping = stopped(step) or stopping
        saves = saves or step % checkpoint_every == 0 or step == num_steps or stopping
        if not (saves or step % log_every == 0):
            continue
        rows, skipped = jax.device_get((seen, state.skipped))
        if skipped > max_skipped:
            raise UserError(_diverged(int(skipped), step, start))
        log(step, _summary(rows) | {"steps_per_second": len(rows) / (time.perf_counter() - since)})
        if saves and (not skipped or step == num_steps):
            save(step, state)
            saves = False
            if stopping:
                break
        seen, since = [], time.perf_counter()
    return state


def _diverged(skipped: int, step: int, start: int) -> str:
    """What to tell and to advise when the last `skipped` steps, up to `step`, had no gradient; `start` was restored."""
    told = f"training diverged: the last {skipped} gradients, up to step {step}, are not finite; "
    if start and skipped >= step - start:
        return told + (
            f"none was since the checkpoint of step {start}: look at the data, or put checkpoints/{start} out of the "
            "way to go on from the one before"
        )
    return told + (
        "the checkpoints before them are as they were: start again with a lower config.training.learning_rate "
        "and --retune"
    )


def _summary(rows: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Of the metrics of some steps, as `fit` logs them; without a loss if all were skipped."""
    table = np.array([[row["loss"], row["grad_norm"]] for row in rows], np.float64)
    finite = table[np.isfinite(table).all(axis=1)]
    summary: dict[str, float] = {"skipped": len(rows) - len(finite)}
    if not len(finite):
        return summary
    loss, grad_norm = finite.mean(axis=0).tolist()
    return {"loss": loss, "grad_norm": grad_norm, "loss_max": float(finite[:, 0].max()), **summary}
