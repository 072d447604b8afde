"""From a config to objects.

A config names things by their public names, `config.sde = dict(name='VP', beta_max=20.0)`;
the other fields are the arguments.  Names are looked up in the module's `__all__`.
"""

import copy
import dataclasses
import functools
import inspect
import math
import operator
from collections.abc import Callable, Collection
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from ml_collections import ConfigDict

from score_jax import data, guidance, lookup, losses, networks, parameterization, samplers, timesteps
from score_jax import sde as sde_module
from score_jax.errors import UserError
from score_jax.sde import DDPM, SDE, ScoreFn

__all__ = [
    "chosen",
    "is_classifier",
    "make_grid",
    "make_guided_score_fn",
    "make_log_likelihood",
    "make_net",
    "make_network",
    "make_sampler",
    "make_score_fn",
    "make_sde",
    "num_classes",
    "open_data",
    "resolve",
    "sampling_sde",
]


def _step(config: ConfigDict, sde: SDE, t: Array) -> Array:
    if not isinstance(sde, DDPM):
        raise UserError(f"config.conditioning: 'step' is for the chain of DDPM, not for {type(sde).__name__}")
    return jnp.shape(sde.betas)[0] * t - 1


# The value that conditions the network; `none` leaves to the parameterization what it passes on, as EDM's does.
CONDITIONINGS: dict[str, Callable[[ConfigDict, SDE, Array], Array]] = {
    "time": lambda config, sde, t: 999.0 * t,
    "noise_level": lambda config, sde, t: sde.sigma(t),
    "level": lambda config, sde, t: timesteps.level_of_time(sde, t, config.num_levels),
    "step": _step,
    "none": lambda config, sde, t: t,
}


def chosen(config: ConfigDict, given: Collection[str]) -> ConfigDict:
    """The config without the arguments that are another sampler's or corrector's than the one that was asked for.

    Args:
      config: that of a file with some fields set by hand.
      given: those fields, `sampling.sampler.name` say; an argument among them stays, and is an error where it is wrong.

    Raises:
      UserError: for an argument of a corrector or of guidance where there is none.
    """
    config = copy.deepcopy(config)
    for part in ("sampling.sampler", "sampling.corrector"):
        node = operator.attrgetter(part)(config)
        if f"{part}.name" in given and node.name:
            fn = lookup.find(samplers, node.name, f"config.{part}", takes="sde, score_fn")
            with node.unlocked():
                for name in lookup.fields(node).keys() - inspect.signature(fn).parameters.keys():
                    if f"{part}.{name}" not in given:
                        del node[name]
    for part in ("sampling.corrector", "sampling.guidance"):
        lost = [name for name in given if name.startswith(f"{part}.")]
        if lost and f"{part}.name" not in lost and not operator.attrgetter(part)(config).name:
            raise UserError(f"config.{lost[0]}: nothing takes it: set config.{part}.name, too")
    if "sampling.sampler.name" in given and "sampling.step_size" not in given and not _langevin(config):
        with config.sampling.ignore_type():
            config.sampling.step_size = 0.0
    return config


def make_sde(config: ConfigDict) -> SDE:
    """The process of `config.sde`."""
    for name, value in lookup.fields(config.sde).items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            auto = " ('auto' is found from the data when `run` starts)" if value == "auto" else ""
            raise UserError(f"config.sde.{name} must be a finite number, got {value!r}{auto}")
    public = {n: getattr(sde_module, n) for n in sde_module.__all__}
    processes = {n: o for n, o in public.items() if inspect.isclass(o) and issubclass(o, SDE) and o is not SDE}
    cls = lookup.choose(processes, config.sde.name, "config.sde")
    return lookup.call(cls, field="config.sde", **lookup.fields(config.sde))


def sampling_sde(config: ConfigDict, sde: SDE) -> SDE:
    """The process up to where sampling ends."""
    t_min, field = config.sampling.t_min, "config.sampling.t_min"
    return lookup.call(lambda: dataclasses.replace(sde, t_min=t_min), field=field)


def make_network(config: ConfigDict) -> nn.Module:
    """The Linen module of `config.network`."""
    cls = lookup.choose({n: getattr(networks, n) for n in networks.__all__}, config.network.name, "config.network")
    if not 0 <= (rate := config.network.get("dropout", 0.0)) < 1:
        raise UserError(f"config.network.dropout must be at least 0 and less than 1, got {rate}")
    if config.network.get("dtype") == "float16" and jax.default_backend() == "cpu":  # XLA has no attention in it there.
        raise UserError("config.network.dtype: a CPU does not compute in 'float16': take 'bfloat16' or 'float32'")
    return lookup.call(cls, field="config.network", **lookup.fields(config.network))


def num_classes(config: ConfigDict) -> int:
    """0 for a network that knows no classes."""
    return config.network.get("num_classes", 0)


def is_classifier(config: ConfigDict) -> bool:
    """Whether the network is trained to tell the class of x_t, not its score."""
    return config.training.objective == losses.cross_entropy.__name__


def make_net(
    config: ConfigDict, sde: SDE, network: nn.Module, params: Any, y: Array | None = None, **apply: Any
) -> Callable[[Array, Array], Array]:
    """What a network with parameters says of (x, t), whatever that is; arguments as in `make_score_fn`."""
    condition = lookup.choose(CONDITIONINGS, config.conditioning, "config.conditioning")

    def net(x: Array, t: Array) -> Array:
        return cast(Array, network.apply(params, x, condition(config, sde, t), y, **apply))

    return net


def make_log_likelihood(
    config: ConfigDict, sde: SDE, network: nn.Module, params: Any, y: Array, **apply: Any
) -> Callable[[Array, Array], Array]:
    """log p(y | x_t) of a classifier, as `guidance.classifier_guidance` takes it; arguments as in `make_score_fn`."""
    net = make_net(config, sde, network, params, **apply)

    def log_likelihood(x: Array, t: Array) -> Array:
        return jnp.take_along_axis(jax.nn.log_softmax(net(x, t)), y[:, None], axis=1)[:, 0]

    return log_likelihood


def make_score_fn(
    config: ConfigDict, sde: SDE, network: nn.Module, params: Any, y: Array | None = None, **apply: Any
) -> ScoreFn:
    """The score of a network with parameters.

    Args:
      config: its `parameterization` and `conditioning` say what the network predicts and is given.
      sde: the process.
      network: a Linen module.
      params: its parameters.
      y: labels `[batch]`, for a network of classes; `num_classes` for none.
      **apply: passed to `network.apply`: `train`, `rngs`.
    """
    net = make_net(config, sde, network, params, y, **apply)
    adapter = lookup.find(parameterization, config.parameterization.name, "config.parameterization", takes="sde, net")
    return lookup.call(adapter, sde, net, field="config.parameterization", **lookup.fields(config.parameterization))


def make_guided_score_fn(
    config: ConfigDict,
    sde: SDE,
    network: nn.Module,
    params: Any,
    y: Array,
    classifier: Callable[[Array, Array, Array], Array] | None = None,
) -> ScoreFn:
    """The score that sampling follows: that of the network, under `config.sampling.guidance` if it has a name.

    Args:
      config: also as in `make_score_fn`, and so the rest.
      y: labels `[batch]`, of the network, the classifier or both.
      classifier: `classifier(y, x, t) -> [batch]`, log p(y | x_t), for classifier guidance.

    Raises:
      UserError: for guidance without a classifier by a network that knows no classes, or not what 'no class' is.
    """
    classes, field = num_classes(config), "config.sampling.guidance"
    score_fn = make_score_fn(config, sde, network, params, y if classes else None)
    name = config.sampling.guidance.name
    if not name:
        return score_fn
    fns = guidance.classifier_guidance, guidance.classifier_free_guidance
    guide = lookup.choose({fn.__name__: fn for fn in fns}, name, field)
    other: Callable[[Array, Array], Array]
    if guide is guidance.classifier_guidance:
        other = functools.partial(cast(Callable, classifier), y)
    elif classes and config.training.label_dropout:
        other = make_score_fn(config, sde, network, params, jnp.full_like(y, classes))
    else:
        raise UserError(f"{field}: {name} needs a network of classes, trained with config.training.label_dropout")
    fields = {k: v for k, v in lookup.fields(config.sampling.guidance).items() if k != "classifier"}
    return lookup.call(guide, score_fn, other, field=field, **fields)


def make_sampler(config: ConfigDict, sde: SDE, score_fn: ScoreFn) -> samplers.Sampler:
    """The sampler of `config.sampling.sampler`, followed by that of `config.sampling.corrector`, if it has a name."""
    step_size = _step_size(config, sde) if config.sampling.step_size else 0

    def build(chosen: ConfigDict, field: str) -> samplers.Sampler:
        fn = lookup.find(samplers, chosen.name, field, takes="sde, score_fn")
        fields = lookup.fields(chosen)
        if step_size and fn is samplers.annealed_langevin_corrector:
            if "snr" in fields:
                raise UserError(
                    f"{field}.snr: config.sampling.step_size stands for it: set one of them to 0 or leave it"
                )
            # The published step size, at the smallest level, is 2 snr^2 sigma^2.
            fields["snr"] = jnp.sqrt(step_size / 2) / sde.sigma(sde.t_min)
        return lookup.call(fn, sde, score_fn, field=field, **fields)

    predictor = build(config.sampling.sampler, "config.sampling.sampler")
    if not config.sampling.corrector.name:
        return predictor
    return samplers.chain(predictor, build(config.sampling.corrector, "config.sampling.corrector"))


def _step_size(config: ConfigDict, sde: SDE) -> float:
    """Of annealed Langevin at the smallest level, in the published notation; 'auto' by NCSNv2's Technique 4."""
    sampling, langevin = config.sampling, _langevin(config)
    if not langevin:
        raise UserError(
            "config.sampling.step_size: only 'annealed_langevin_corrector' has one, "
            f"not {sampling.sampler.name!r}: set it to 0"
        )
    if sampling.step_size != "auto":
        return sampling.step_size
    if sampling.num_steps < 2 or "num_steps" not in langevin:
        raise UserError(
            "config.sampling.step_size: 'auto' needs config.sampling.num_steps >= 2 and the num_steps of "
            f"{langevin.name!r}, 5 say"
        )
    with jax.ensure_compile_time_eval():
        first, last = float(sde.sigma(sde.t_max)), float(sde.sigma(sde.t_min))
    ratio = (first / last) ** (1 / (sampling.num_steps - 1))
    return timesteps.langevin_step_size(last, ratio, langevin.num_steps) / 2


def _langevin(config: ConfigDict) -> ConfigDict | None:
    """The sampler or corrector of the config that `sampling.step_size` is for, if there is one."""
    name = samplers.annealed_langevin_corrector.__name__
    return next((c for c in (config.sampling.sampler, config.sampling.corrector) if c.name == name), None)


def make_grid(config: ConfigDict, sde: SDE, score_fn: ScoreFn, x: Array) -> Array:
    """The times that `config.sampling` walks; where they are learned, from the paths of x, `[batch, *event]`."""
    takes = "sde, n", "sde, score_fn, x, n"
    grid = lookup.find(timesteps, config.sampling.grid, "config.sampling.grid", takes=takes)
    arguments = (sde, score_fn, x) if grid is timesteps.curvature else (sde,)
    return lookup.call(grid, *arguments, config.sampling.num_steps, field="config.sampling.num_steps")


def open_data(config: ConfigDict, split: str, *, classes: int | None = None) -> data.Dataset:
    """A split of the data set of `config.data`.

    Args:
      config: the experiment.
      split: `train` or `test`.
      classes: how many its labels may be of, 0 where they do not matter; unless told those that the network takes.

    Raises:
      UserError: if it cannot be opened, or has more classes, or none.
    """
    fields = {"data_dir": config.data.dir, "image_size": config.data.image_size, "crop": config.data.get("crop")}
    fields["background"] = config.data.get("background")
    dataset = data.load(config.data.name, split, **{name: value or None for name, value in fields.items()})
    classes = num_classes(config) if classes is None else classes
    if not classes:
        return dataset
    dataset = data.labelled(dataset, classes, f"the {split} split of the data set {config.data.name!r}")
    if split == "train" and dataset.num_classes < classes:
        print(
            f"the data set {config.data.name!r} has {dataset.num_classes} of the {classes} classes that the network "
            f"takes: of class {dataset.num_classes} and those after it nothing is learned here, but samples are made"
        )
    return dataset


def resolve(config: ConfigDict, dataset: data.Dataset) -> ConfigDict:
    """The config with its 'auto' values found from the data, by NCSNv2's techniques 1 and 4; prints them."""
    config = copy.deepcopy(config)
    if config.sde.get("sigma_max") == "auto":
        x = dataset.read(np.arange(dataset.size))[0]
        unit = (2 if config.data.centered else 1) / 255 if x.dtype == np.uint8 else 1  # See `data.to_float`.
        config.sde.sigma_max = unit * timesteps.largest_distance(x)
        print(f"sigma_max: {config.sde.sigma_max:.4g}, the largest distance between two of {dataset.size} examples")
    if config.sampling.step_size == "auto":
        sde = sampling_sde(config, make_sde(config))
        config.sampling.step_size = _step_size(config, sde)
        print(f"step_size: {config.sampling.step_size:.4g}, for {config.sampling.num_steps} levels")
    return config
