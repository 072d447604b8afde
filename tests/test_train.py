"""The training step and its loop, on a quadratic whose every step is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from score_jax import train
from score_jax.errors import UserError


def quadratic(params, key, batch):
    return jnp.sum((params["w"] - batch) ** 2) / 2


def fit(
    state, step, *, num_steps=10, batches=None, log_every=5, checkpoint_every=4, max_skipped=0, saved=None, **options
):
    logged, saved = [], [] if saved is None else saved
    state = train.fit(
        step,
        state,
        jax.random.key(0),
        iter(batches or itertools.repeat(jnp.full(3, 2.0))),
        num_steps=num_steps,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        log=lambda n, metrics: logged.append((n, metrics)),
        save=lambda n, state: saved.append((n, jax.device_get(state))),
        max_skipped=max_skipped,
        **options,
    )
    return state, logged, saved


def test_steps_and_average_follow_their_equations():
    optimizer = optax.sgd(0.1)
    step = train.make_train_step(quadratic, optimizer, ema_decay=0.5)
    state, logged, saved = fit(train.init_state({"w": jnp.zeros(3)}, optimizer), step)
    w = ema = 0.0
    losses = []
    for i in range(10):
        losses.append(3 * (w - 2) ** 2 / 2)
        w = w + 0.1 * (2 - w)
        decay = min(0.5, (1 + i) / (10 + i))
        ema = decay * ema + (1 - decay) * w
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
    np.testing.assert_allclose(state.ema["w"], ema, rtol=1e-5)
    assert [n for n, _ in saved] == [4, 8, 10]
    assert [n for n, _ in logged] == [4, 5, 8, 10]
    np.testing.assert_allclose(logged[0][1]["loss"], np.mean(losses[:4]), rtol=1e-5)
    np.testing.assert_allclose(logged[-1][1]["loss"], np.mean(losses[8:]), rtol=1e-5)


def test_the_key_changes_with_the_step_and_the_trace_does_not():
    keys, traces = [], []

    def loss_fn(params, key, batch):
        traces.append(1)
        return params["w"].sum() * jax.random.uniform(key)

    step = train.make_train_step(loss_fn, optax.sgd(0.0), ema_decay=0.9)
    state = train.init_state({"w": jnp.ones(3)}, optax.sgd(0.0))
    for _ in range(4):
        state, metrics = step(state, jax.random.key(0), jnp.ones(3))
        keys.append(float(metrics["loss"]))
    assert len(set(keys)) == 4
    assert len(traces) == 1


def test_gradients_that_are_not_finite_change_nothing_up_to_a_limit():
    """Batches 3 to 5 of ten are not finite: seven steps of the quadratic, and a count."""
    optimizer = optax.adam(0.1)
    step = train.make_train_step(quadratic, optimizer, ema_decay=0.5)
    good, bad = jnp.full(3, 2.0), jnp.full(3, jnp.nan)

    def run(batches, **options):
        state = train.init_state({"w": jnp.zeros(3)}, optimizer)
        return fit(state, step, num_steps=len(batches), batches=batches, checkpoint_every=100, **options)

    skipping, logged, _ = run([good] * 2 + [bad] * 3 + [good] * 5, max_skipped=3)
    plain, _, _ = run([good] * 7)
    jax.tree.map(np.testing.assert_array_equal, skipping.params, plain.params)
    jax.tree.map(np.testing.assert_array_equal, skipping.opt_state, plain.opt_state)
    assert (int(skipping.step), int(skipping.skipped)) == (10, 0)
    assert [(n, metrics["skipped"]) for n, metrics in logged] == [(5, 3), (10, 0)]
    assert logged[0][1]["loss_max"] == pytest.approx(6.0)  # 3 (0 - 2)^2 / 2, of the first step.
    saved = []
    with pytest.raises(UserError, match="the last 4 gradients, up to step 5, are not finite; the checkpoints before"):
        run([good] + [bad] * 4 + [good] * 5, max_skipped=3, saved=saved)
    assert not saved  # What the gradients fail at would stand for a good checkpoint.


def test_nothing_is_saved_among_steps_that_were_skipped():
    """A checkpoint is due after step 4, and a stop is asked for after step 6; batches 4, 6 and 7 are not finite."""
    optimizer, asked = optax.sgd(0.1), []
    step = train.make_train_step(quadratic, optimizer, ema_decay=0.5)
    batches = [jnp.full(3, jnp.nan if i in (4, 6, 7) else 2.0) for i in range(1, 11)]

    def stopped(n):
        asked.append(n)
        return n == 6  # Once, as several processes are told.

    options = dict(batches=batches, max_skipped=3, stopped=stopped)
    state, _, saved = fit(train.init_state({"w": jnp.zeros(3)}, optimizer), step, **options)
    assert [n for n, _ in saved] == [5, 8]
    assert asked == list(range(1, 9))
    assert int(state.step) == 8


def test_accumulated_gradients_are_those_of_the_whole_batch():
    def loss_fn(params, key, batch):
        return jnp.mean(jnp.sum((params["w"][None] - batch) ** 2, axis=1))

    batch = jax.random.normal(jax.random.key(0), (12, 3))
    states = []
    for accumulate in (1, 4):
        step = train.make_train_step(loss_fn, optax.sgd(0.1), ema_decay=0.9, accumulate=accumulate)
        state, metrics = step(train.init_state({"w": jnp.ones(3)}, optax.sgd(0.1)), jax.random.key(0), batch)
        states.append((state.params["w"], metrics["loss"], metrics["grad_norm"]))
    for whole, parts in zip(*states, strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-6)


@pytest.mark.parametrize(("decay", "last"), [("constant", 1.0), ("cosine", 0.0)])
def test_learning_rate_rises_and_falls(decay, last):
    """Adam's first updates have the size of the learning rate: 1/5, 2/5, ... of it in a warm-up of 4."""
    optimizer = train.make_optimizer(1.0, num_steps=20, warmup_steps=4, decay=decay)
    state, params, sizes = optimizer.init(jnp.ones(1)), jnp.ones(1), []
    for _ in range(21):
        update, state = optimizer.update(jnp.ones(1), state, params)
        sizes.append(-float(update[0]))
    np.testing.assert_allclose(sizes[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-3)
    assert sizes[-1] == pytest.approx(last, abs=0.01)
    with pytest.raises(UserError, match="'constant' or 'cosine'"):
        train.make_optimizer(1.0, num_steps=2, decay="cosin")
