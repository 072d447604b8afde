"""The modes of `run.py`.  With `build`, which makes the objects, the only reader of a config."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from score_jax import checkpoint, data, evaluate, lookup, parameterization, report, samplers, train
from score_jax.build import (
    make_grid,
    make_loss,
    make_network,
    make_sampler,
    make_score_fn,
    make_sde,
    num_classes,
    open_data,
    resolve,
)
from score_jax.errors import UserError
from score_jax.sde import sample_prior
from score_jax.workdir import MetricLog, open_workdir, save_samples

__all__ = ["MODES", "make_network", "make_sampler", "make_score_fn", "make_sde", "run"]


@dataclasses.dataclass
class _Run:
    """What every mode needs: the objects that a config names, and the training state's shape."""

    config: ConfigDict
    workdir: pathlib.Path

    def __post_init__(self):
        self.dataset = open_data(self.config, "train")
        self.config = config = resolve(self.config, self.dataset)
        self.sde, self.network = make_sde(config), make_network(config)
        self.sampling_sde = dataclasses.replace(self.sde, t_min=config.sampling.t_min)
        # One split: `fold_in(key, i)` and `split(key)[i]` are the same key.
        self.key_params, self.key_train, self.key_sample = jax.random.split(jax.random.key(config.seed), 3)
        self.optimizer = train.make_optimizer(
            config.training.learning_rate,
            num_steps=config.training.num_steps,
            warmup_steps=config.training.warmup_steps,
            grad_clip=config.training.grad_clip,
            decay=config.training.decay,
        )
        # Mistakes fail here, before any work.
        self.check_sampling()
        self.state = lookup.call(lambda: jax.eval_shape(self.init_state), field="config.network")
        loss_fn = make_loss(config, self.sde, self.network)
        batch = {"x": jnp.zeros((1, *self.dataset.shape)), "y": jnp.zeros(1, jnp.int32)}
        lookup.call(lambda: jax.eval_shape(loss_fn, self.state.params, self.key_train, batch), field="config.training")
        open_workdir(self.workdir, config.to_dict())

    def init_state(self) -> train.TrainState:
        x, y = jnp.zeros((1, *self.dataset.shape)), jnp.zeros(1, jnp.int32)
        params = self.network.init(self.key_params, x, jnp.ones(1), y if num_classes(self.config) else None)
        return train.init_state(params, self.optimizer)

    def check_sampling(self) -> None:
        sde = self.sampling_sde
        make_sampler(self.config, sde, make_score_fn(self.config, sde, self.network, None))
        make_grid(self.config, sde)

    def restore(self) -> tuple[int, train.TrainState]:
        """The newest checkpoint's step and state."""
        with checkpoint.open_manager(self.workdir / "checkpoints") as manager:
            step = manager.latest_step()
            if step is None:
                raise UserError(f"{self.workdir} has no checkpoint: train first, with --mode=train")
            return step, checkpoint.restore(manager, step, self.state)[0]

    def generate(self, params: Any, num_samples: int) -> np.ndarray:
        """Samples in the data's own range, `[num_samples, ...]` on the host."""
        config, classes = self.config, num_classes(self.config)
        sde = self.sampling_sde
        chunk = min(num_samples, config.sampling.batch_size)

        def draw(params: Any, key: Array, y: Array) -> Array:
            score_fn = make_score_fn(config, sde, self.network, params, y if classes else None)
            key_prior, key_steps = jax.random.split(key)
            x = sample_prior(key_prior, sde, (chunk, *self.dataset.shape))
            x = samplers.sample(key_steps, make_sampler(config, sde, score_fn), x, make_grid(config, sde))
            return parameterization.tweedie(sde, score_fn, x, sde.t_min) if config.sampling.denoise else x

        compiled, chunks = jax.jit(draw), []
        for i in range(-(-num_samples // chunk)):
            y = (i * chunk + jnp.arange(chunk)) % (classes or 1)
            inputs = params, jax.random.fold_in(self.key_sample, i), y
            chunks.append(np.asarray(compiled(*inputs)))
            if not np.isfinite(chunks[-1]).all():
                try:
                    draw(*inputs)  # Outside `jit` the loop knows where.
                except FloatingPointError as error:
                    raise UserError(f"{error} (config.sampling)") from error
                raise UserError("the samples are not finite after the last, denoising step (config.sampling.denoise)")
        return np.concatenate(chunks)[:num_samples]

    def write_samples(self, step: int, params: Any) -> None:
        samples = self.generate(params, self.config.sampling.num_samples)
        print("samples:", save_samples(self.workdir, step, samples, centered=self.config.data.centered))


def _train(run: _Run) -> None:
    config = run.config
    num_steps = config.training.num_steps

    def transform(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        fields = ("centered", "random_flip", "dequantize")
        return data.to_float(x, rng, **{name: config.data[name] for name in fields})

    batches = data.batches(run.dataset, config.training.batch_size, seed=config.seed, transform=transform)
    with checkpoint.open_manager(run.workdir / "checkpoints") as manager:
        start = manager.latest_step() or 0
        if start:
            state, position = checkpoint.restore(manager, start, run.state)
            batches.set_state(position)
            print(f"resuming {run.workdir} at step {start}")
        else:
            state = jax.jit(run.init_state)()
        step_fn = train.make_train_step(
            make_loss(config, run.sde, run.network), run.optimizer, ema_decay=config.training.ema_decay
        )
        with MetricLog(run.workdir, start=start, num_steps=num_steps) as log:
            try:
                state = train.fit(
                    step_fn,
                    state,
                    run.key_train,
                    batches,
                    num_steps=num_steps,
                    log_every=config.training.log_every,
                    checkpoint_every=config.training.checkpoint_every,
                    log=log,
                    save=lambda step, state: checkpoint.save(manager, step, state, batches.get_state()),
                )
            except UserError as error:
                manager.wait_until_finished()
                kept = manager.latest_step()
                kept = f"the checkpoint of step {kept} is kept" if kept else "there is no checkpoint yet"
                raise UserError(f"{error}; {kept}; try a lower config.training.learning_rate") from error
    run.write_samples(int(state.step), state.ema)


def _sample(run: _Run) -> None:
    step, state = run.restore()
    run.write_samples(step, state.ema)


def _evaluate(run: _Run) -> None:
    config = run.config
    _, state = run.restore()
    generated = run.generate(state.ema, config.evaluation.num_samples)
    table = evaluate.against_data(
        generated,
        [run.dataset, open_data(config, "test")],
        centered=config.data.centered,
        classifier=config.evaluation.classifier,
    )
    (run.workdir / "evaluation.json").write_text(json.dumps(table, indent=1) + "\n")
    print(evaluate.as_text(table))


def _likelihood(run: _Run) -> None:
    config = run.config

    def score(params: Any, y: Array, x: Array, t: Array) -> Array:
        return make_score_fn(config, run.sde, run.network, params, y if num_classes(config) else None)(x, t)

    table = lookup.call(
        evaluate.likelihood,
        run.key_sample,
        run.sde,
        functools.partial(jax.tree_util.Partial, score, run.restore()[1].ema),
        open_data(config, "test"),
        field="config.evaluation.likelihood",
        num_images=config.evaluation.num_samples,
        batch_size=config.sampling.batch_size,
        centered=config.data.centered,
        dequantized=config.data.dequantize,
        **config.evaluation.likelihood,
    )
    (run.workdir / "likelihood.json").write_text(json.dumps(table, indent=1) + "\n")
    print("\n".join(f"{name:28}{value:12.5g}" for name, value in table.items()))


MODES: dict[str, Callable[[_Run], None]] = {f.__name__[1:]: f for f in (_train, _sample, _evaluate, _likelihood)}


def run(config: ConfigDict, mode: str, workdir: str | pathlib.Path) -> None:
    """Run a mode of an experiment.

    Args:
      config: the experiment.
      mode: `train`, `sample`, `evaluate` or `likelihood`.
      workdir: where its files lie; made by `train`.

    Raises:
      UserError: for any mistake in the arguments, in one line.
    """
    act = lookup.choose(MODES, mode, "--mode")
    train.tune_cpu()
    experiment = _Run(config, pathlib.Path(workdir))
    act(experiment)
    print("report:", report.write_report(experiment.workdir))
