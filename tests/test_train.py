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


def fit(state, step, *, num_steps=10, batch=2.0, log_every=5, checkpoint_every=4):
    logged, saved = [], []
    state = train.fit(
        step,
        state,
        jax.random.key(0),
        itertools.repeat(jnp.full(3, batch)),
        num_steps=num_steps,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        log=lambda n, metrics: logged.append((n, metrics)),
        save=lambda n, state: saved.append(n),
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
    assert saved == [4, 8, 10]
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


def test_divergence_stops_and_saves_nothing():
    step = train.make_train_step(quadratic, optax.sgd(1e20), ema_decay=0.9)
    with pytest.raises(UserError, match="diverged between steps 1 and 4"):
        fit(train.init_state({"w": jnp.zeros(3)}, optax.sgd(1e20)), step)


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
