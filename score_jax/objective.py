"""From a config to the loss that training minimises."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from ml_collections import ConfigDict

from score_jax import data, distillation, lookup, losses, networks, timesteps, train
from score_jax.build import is_classifier, make_log_likelihood, make_network, make_score_fn, num_classes
from score_jax.errors import UserError
from score_jax.sde import SDE

__all__ = ["check_jumps", "check_teacher", "has_teacher", "is_distilled", "make_loss"]


def make_loss(config: ConfigDict, sde: SDE, network: nn.Module) -> train.LossFn:
    """`loss_fn(params, key, batch, teacher=None)`: the mean objective over a batch.

    Where the objective distils a teacher (`has_teacher`), that is the network with the parameters `teacher`.
    """
    if is_classifier(config) != isinstance(network, networks.Classifier):
        raise UserError(
            f"config.training.objective: {config.training.objective!r} does not train a {config.network.name}: "
            "'cross_entropy' is for the network Classifier, and for it alone"
        )
    dropout, losses_of = _label_dropout(config), _losses(config, sde)
    images = {name: config.data[name] for name in ("centered", "random_flip", "dequantize")}

    def loss_fn(params: Any, key: Array, batch: dict[str, Array], teacher: Any = None) -> Array:
        key_t, key_noise, key_dropout, key_data = jax.random.split(key, 4)
        x, y = data.augment(key_data, batch["x"], **images), batch["y"]
        if dropout:
            key_dropout, key_label = jax.random.split(key_dropout)
            y = jnp.where(jax.random.bernoulli(key_label, dropout, y.shape), num_classes(config), y)
        apply: dict[str, Any] = dict(train=True, rngs={"dropout": key_dropout})
        if is_classifier(config):
            log_likelihood = make_log_likelihood(config, sde, network, params, y, **apply)
            return jnp.mean(losses_of(key_t, key_noise, x, log_likelihood))
        labels = y if num_classes(config) else None
        fns = [make_score_fn(config, sde, network, params, labels, **apply)]
        if has_teacher(config):
            fns.append(make_score_fn(config, sde, network, teacher, labels))
        loss = jnp.mean(losses_of(key_t, key_noise, x, *fns))
        # The published VP configs average over dimensions, the VE ones take half the sum (reduce_mean).
        return loss * 2 / x[0].size if config.training.reduce_mean else loss

    return loss_fn


def is_distilled(config: ConfigDict) -> bool:
    """Whether the network is trained to take large steps, and predicts no score."""
    return config.training.objective in distillation.__all__


def has_teacher(config: ConfigDict) -> bool:
    """Whether training distils a network that is there already."""
    return "teacher" in inspect.signature(_objective(config)).parameters


def check_jumps(config: ConfigDict, sde: SDE) -> None:
    """Raise a `UserError` if a distilled network is sampled in other steps than those that it learns."""
    training, sampling = config.training, config.sampling.to_dict()
    if not is_distilled(config):
        return
    sampling["sampler"] = {name: value for name, value in sampling["sampler"].items() if value}  # Without an eta of 0.
    due = {"t_min": sde.t_min, "denoise": False, "sampler": {"name": "consistency"}}
    if training.objective == distillation.progressive_distillation.__name__:
        steps = training.distillation.num_steps // 2
        due |= {"sampler": {"name": "ddim"}, "grid": training.distillation.grid, "num_steps": steps}
    due |= {part: sampling[part] | {"name": ""} for part in ("corrector", "guidance")}
    for name, value in due.items():
        if sampling[name] != value:
            raise UserError(
                f"config.sampling.{name}: a network of {training.objective} takes the steps that it learned, so this "
                f"must be {value!r}, got {sampling[name]!r}"
            )


def check_teacher(config: ConfigDict, teacher: ConfigDict) -> None:
    """Raise a `UserError` if one experiment's network cannot be the teacher of another's."""
    field, training, other = "config.training.distillation.teacher", config.training, teacher.training
    ours, theirs = (
        {name: tuple(v) if isinstance(v, list) else v for name, v in vars(make_network(c)).items() if name[0] != "_"}
        for c in (config, teacher)
    )
    for name in sorted(ours.keys() - {"dropout", "remat", "dtype"}):
        if ours[name] != theirs.get(name):
            raise UserError(f"{field}: config.network.{name} is {theirs.get(name)!r} there and {ours[name]!r} here")
    if training.label_dropout and not other.label_dropout:
        raise UserError(f"{field}: it knows no 'no class': it was trained without config.training.label_dropout")
    if not is_distilled(teacher):
        return
    here, there = ((t.objective, t.distillation.grid, t.distillation.num_steps) for t in (training, other))
    halved = distillation.progressive_distillation.__name__
    if here[0] != halved or there != (halved, here[1], 2 * here[2]):
        raise UserError(
            f"{field}: it is a student of {there[0]} on {there[1]!r} of {there[2]} steps; only {halved} on the same "
            f"grid of half as many steps goes on from one, here {here[0]} on {here[1]!r} of {here[2]}"
        )


def _objective(config: ConfigDict) -> Callable[..., Array]:
    field = "config.training.objective"
    return lookup.find((losses, distillation), config.training.objective, field, takes="key, sde")


def _losses(config: ConfigDict, sde: SDE) -> Callable[..., Array]:
    """The objective of each example, `losses(key_t, key_noise, x, *fns) -> [batch]`, of a network, and its teacher."""
    training, objective = config.training, _objective(config)
    draw = lookup.find(timesteps, training.times, "config.training.times", takes="key, sde, n")
    if draw is timesteps.draw_levels:
        draw = functools.partial(draw, num_levels=config.num_levels)
    weight = lookup.find(losses, training.weighting, "config.training.weighting", takes="sde, t")
    if weight is losses.edm_weighting:
        weight = functools.partial(weight, sigma_data=config.parameterization.get("sigma_data", 0.5))
    weighted = objective if is_classifier(config) else functools.partial(objective, weight=weight)
    if is_distilled(config):
        ts = _times(config, sde)
        return lambda key_t, key_noise, x, *fns: weighted(key_noise, sde, *fns, x, ts)

    def losses_of(key_t: Array, key_noise: Array, x: Array, fn: Callable) -> Array:
        t, importance = draw(key_t, sde, len(x))
        return importance * weighted(key_noise, sde, fn, x, t)

    return losses_of


def _times(config: ConfigDict, sde: SDE) -> Array:
    """The grid of `config.training.distillation`, `[num_steps + 1]`."""
    field, n = "config.training.distillation", config.training.distillation.num_steps
    grid = lookup.find(timesteps, config.training.distillation.grid, f"{field}.grid", takes="sde, n")
    with jax.ensure_compile_time_eval():
        ts = lookup.call(grid, sde, n, field=f"{field}.num_steps")
        halves = n % 2 == 0 and _objective(config) is distillation.progressive_distillation
        if halves and not np.allclose(ts[::2], grid(sde, n // 2), rtol=1e-3):
            raise UserError(f"{field}.grid: every second time of {grid.__name__!r} is not its grid of half the steps")
    return ts


def _label_dropout(config: ConfigDict) -> float:
    """The share of labels that training replaces by 'no class'."""
    rate, field = config.training.label_dropout, "config.training.label_dropout"
    if rate and (is_classifier(config) or not num_classes(config)):
        raise UserError(
            f"{field} is {rate}, but the network takes no labels: set config.network.num_classes, or 0 here"
        )
    return rate
