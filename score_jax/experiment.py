"""From a config to objects, and the modes of `run.py`: the only reader of a config.

A config names things by their public names, `config.sde = dict(name='VP', beta_max=20.0)`;
the other fields are the arguments.  Names are looked up in the module's `__all__`.
"""

import copy
import dataclasses
import functools
import inspect
import json
import pathlib
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from ml_collections import ConfigDict

from score_jax import (
    checkpoint,
    data,
    evaluate,
    lookup,
    losses,
    networks,
    parameterization,
    report,
    samplers,
    timesteps,
    train,
)
from score_jax import sde as sde_module
from score_jax.errors import UserError
from score_jax.sde import SDE, ScoreFn, sample_prior
from score_jax.workdir import MetricLog, open_workdir, save_samples

__all__ = ["MODES", "make_network", "make_sampler", "make_score_fn", "make_sde", "run"]


# The value that conditions the network; `none` leaves to the parameterization what it passes on, as EDM's does.
CONDITIONINGS: dict[str, Callable[[ConfigDict, SDE, Array], Array]] = {
    "time": lambda config, sde, t: 999.0 * t,
    "noise_level": lambda config, sde, t: sde.sigma(t),
    "level": lambda config, sde, t: timesteps.level_of_time(sde, t, config.num_levels),
    "none": lambda config, sde, t: t,
}


def make_sde(config: ConfigDict) -> SDE:
    """The process of `config.sde`."""
    for name, value in lookup.fields(config.sde).items():
        if not isinstance(value, int | float):
            auto = " ('auto' is found from the data when `run` starts)" if value == "auto" else ""
            raise UserError(f"config.sde.{name}: must be a number, got {value!r}{auto}")
    public = {n: getattr(sde_module, n) for n in sde_module.__all__}
    processes = {n: o for n, o in public.items() if inspect.isclass(o) and issubclass(o, SDE) and o is not SDE}
    cls = lookup.choose(processes, config.sde.name, "config.sde")
    return lookup.call(cls, field="config.sde", **lookup.fields(config.sde))


def make_network(config: ConfigDict) -> nn.Module:
    """The Linen module of `config.network`."""
    cls = lookup.choose({n: getattr(networks, n) for n in networks.__all__}, config.network.name, "config.network")
    return lookup.call(cls, field="config.network", **lookup.fields(config.network))


def _num_classes(config: ConfigDict) -> int:
    """0 for a network that knows no classes."""
    return config.network.get("num_classes", 0)


def make_score_fn(
    config: ConfigDict, sde: SDE, network: nn.Module, params: Any, y: Array | None = None, **apply: Any
) -> ScoreFn:
    """The score of a network with parameters.

    Args:
      config: its `parameterization` and `conditioning` say what the network predicts and is given.
      sde: the process.
      network: a Linen module.
      params: its parameters.
      y: labels `[batch]`, for a network of classes.
      **apply: passed to `network.apply`: `train`, `rngs`.
    """
    condition = lookup.choose(CONDITIONINGS, config.conditioning, "config.conditioning")

    def net(x: Array, t: Array) -> Array:
        cond = jnp.broadcast_to(condition(config, sde, t), x.shape[:1])
        return cast(Array, network.apply(params, x, cond, y, **apply))

    adapter = lookup.find(parameterization, config.parameterization.name, "config.parameterization", takes="sde, net")
    return lookup.call(adapter, sde, net, field="config.parameterization", **lookup.fields(config.parameterization))


def make_sampler(config: ConfigDict, sde: SDE, score_fn: ScoreFn) -> samplers.Sampler:
    """The sampler of `config.sampling.sampler`, followed by that of `config.sampling.corrector`, if it has a name."""

    def build(chosen: ConfigDict, field: str) -> samplers.Sampler:
        fn = lookup.find(samplers, chosen.name, field, takes="sde, score_fn")
        fields = lookup.fields(chosen)
        if config.sampling.step_size and fn is samplers.annealed_langevin_corrector:
            # The published step size, at the smallest level, is 2 snr^2 sigma^2.
            fields["snr"] = jnp.sqrt(_step_size(config, sde) / 2) / sde.sigma(sde.t_min)
        return lookup.call(fn, sde, score_fn, field=field, **fields)

    predictor = build(config.sampling.sampler, "config.sampling.sampler")
    if not config.sampling.corrector.name:
        return predictor
    return samplers.chain(predictor, build(config.sampling.corrector, "config.sampling.corrector"))


def _step_size(config: ConfigDict, sde: SDE) -> float:
    """Of annealed Langevin at the smallest level, in the published notation; 'auto' by NCSNv2's Technique 4."""
    if config.sampling.step_size != "auto":
        return config.sampling.step_size
    with jax.ensure_compile_time_eval():
        first, last = float(sde.sigma(sde.t_max)), float(sde.sigma(sde.t_min))
    ratio = (first / last) ** (1 / (config.sampling.num_steps - 1))
    return timesteps.langevin_step_size(last, ratio, config.sampling.sampler.num_steps) / 2


def _make_grid(config: ConfigDict, sde: SDE) -> Array:
    grid = lookup.find(timesteps, config.sampling.grid, "config.sampling.grid", takes="sde, n")
    return lookup.call(grid, sde, config.sampling.num_steps, field="config.sampling.num_steps")


def _make_loss(config: ConfigDict, sde: SDE, network: nn.Module) -> train.LossFn:
    """`loss_fn(params, key, batch)`: the mean objective over a batch."""
    draw = lookup.find(timesteps, config.training.times, "config.training.times", takes="key, sde, n")
    if draw is timesteps.draw_levels:
        draw = functools.partial(draw, num_levels=config.num_levels)
    objective = lookup.find(
        losses, config.training.objective, "config.training.objective", takes="key, sde, score_fn, x0, t"
    )
    weight = lookup.find(losses, config.training.weighting, "config.training.weighting", takes="sde, t")

    def loss_fn(params: Any, key: Array, batch: dict[str, Array]) -> Array:
        key_t, key_noise, key_dropout = jax.random.split(key, 3)
        x = batch["x"]
        y = batch["y"] if _num_classes(config) else None
        t, importance = draw(key_t, sde, len(x))
        score_fn = make_score_fn(config, sde, network, params, y, train=True, rngs={"dropout": key_dropout})
        loss = jnp.mean(importance * objective(key_noise, sde, score_fn, x, t, weight=weight))
        # The published VP configs average over dimensions, the VE ones take half the sum (reduce_mean).
        return loss * 2 / x[0].size if config.training.reduce_mean else loss

    return loss_fn


def _open_data(config: ConfigDict, split: str) -> data.Dataset:
    return data.load(
        config.data.name, split, data_dir=config.data.dir or None, image_size=config.data.image_size or None
    )


def _resolve(config: ConfigDict, dataset: data.Dataset) -> ConfigDict:
    """The config with its 'auto' values found from the data, by NCSNv2's techniques 1 and 4; prints them."""
    config = copy.deepcopy(config)
    if config.sde.get("sigma_max") == "auto":
        x = dataset.read(np.arange(dataset.size))[0]
        unit = (2 if config.data.centered else 1) / 255 if x.dtype == np.uint8 else 1  # See `data.to_float`.
        config.sde.sigma_max = unit * timesteps.largest_distance(x)
        print(f"sigma_max: {config.sde.sigma_max:.4g}, the largest distance between two of {dataset.size} examples")
    if config.sampling.step_size == "auto":
        config.sampling.step_size = _step_size(
            config, dataclasses.replace(make_sde(config), t_min=config.sampling.t_min)
        )
        print(f"step_size: {config.sampling.step_size:.4g}, for {config.sampling.num_steps} levels")
    return config


@dataclasses.dataclass
class _Run:
    """What every mode needs: the objects that a config names, and the training state's shape."""

    config: ConfigDict
    workdir: pathlib.Path

    def __post_init__(self):
        self.dataset = _open_data(self.config, "train")
        self.config = config = _resolve(self.config, self.dataset)
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
        loss_fn = _make_loss(config, self.sde, self.network)
        batch = {"x": jnp.zeros((1, *self.dataset.shape)), "y": jnp.zeros(1, jnp.int32)}
        lookup.call(lambda: jax.eval_shape(loss_fn, self.state.params, self.key_train, batch), field="config.training")
        open_workdir(self.workdir, config.to_dict())

    def init_state(self) -> train.TrainState:
        x, y = jnp.zeros((1, *self.dataset.shape)), jnp.zeros(1, jnp.int32)
        params = self.network.init(self.key_params, x, jnp.ones(1), y if _num_classes(self.config) else None)
        return train.init_state(params, self.optimizer)

    def check_sampling(self) -> None:
        sde = self.sampling_sde
        make_sampler(self.config, sde, make_score_fn(self.config, sde, self.network, None))
        _make_grid(self.config, sde)

    def restore(self) -> tuple[int, train.TrainState]:
        """The newest checkpoint's step and state."""
        with checkpoint.open_manager(self.workdir / "checkpoints") as manager:
            step = manager.latest_step()
            if step is None:
                raise UserError(f"{self.workdir} has no checkpoint: train first, with --mode=train")
            return step, checkpoint.restore(manager, step, self.state)[0]

    def generate(self, params: Any, num_samples: int) -> np.ndarray:
        """Samples in the data's own range, `[num_samples, ...]` on the host."""
        config, num_classes = self.config, _num_classes(self.config)
        sde = self.sampling_sde
        chunk = min(num_samples, config.sampling.batch_size)

        def draw(params: Any, key: Array, y: Array) -> Array:
            score_fn = make_score_fn(config, sde, self.network, params, y if num_classes else None)
            key_prior, key_steps = jax.random.split(key)
            x = sample_prior(key_prior, sde, (chunk, *self.dataset.shape))
            x = samplers.sample(key_steps, make_sampler(config, sde, score_fn), x, _make_grid(config, sde))
            return parameterization.tweedie(sde, score_fn, x, sde.t_min) if config.sampling.denoise else x

        compiled, chunks = jax.jit(draw), []
        for i in range(-(-num_samples // chunk)):
            y = (i * chunk + jnp.arange(chunk)) % (num_classes or 1)
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
            _make_loss(config, run.sde, run.network), run.optimizer, ema_decay=config.training.ema_decay
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
        [run.dataset, _open_data(config, "test")],
        centered=config.data.centered,
        classifier=config.evaluation.classifier,
    )
    (run.workdir / "evaluation.json").write_text(json.dumps(table, indent=1) + "\n")
    print(evaluate.as_text(table))


MODES: dict[str, Callable[[_Run], None]] = {"train": _train, "sample": _sample, "evaluate": _evaluate}


def run(config: ConfigDict, mode: str, workdir: str | pathlib.Path) -> None:
    """Run a mode of an experiment.

    Args:
      config: the experiment.
      mode: `train`, `sample` or `evaluate`.
      workdir: where its files lie; made by `train`.

    Raises:
      UserError: for any mistake in the arguments, in one line.
    """
    act = lookup.choose(MODES, mode, "--mode")
    train.tune_cpu()
    experiment = _Run(config, pathlib.Path(workdir))
    act(experiment)
    print("report:", report.write_report(experiment.workdir))
