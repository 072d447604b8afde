"""What is measured: networks with the losses, optimizers and data of their experiments."""

import importlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from score_jax import build, data, objective, train

DIGITS, CIFAR = (64, 8, 8, 1), (8, 32, 32, 3)


class Subject(NamedTuple):
    """A network in training.

    Attributes:
      network: a Linen module.
      loss_fn: of its experiment.
      step: the training step, which donates the state.
      state: the first, with random parameters.
      shape: of a batch of images.
    """

    network: Any
    loss_fn: Any
    step: Any
    state: Any
    shape: tuple[int, ...]


def subject(experiment: str, shape: tuple[int, ...], **network) -> Subject:
    """The network of an experiment of `configs`, `vp_cifar` or `ve_cifar:ncsnpp` say, or another in its place."""
    name, _, argument = experiment.partition(":")
    config = importlib.import_module(f"configs.{name}").get_config(*filter(None, [argument]))
    if "name" in network:
        config.network = {}
    config.network.update(network)
    net = build.make_network(config)
    loss_fn = objective.make_loss(config, build.make_sde(config), net)
    optimizer = train.make_optimizer(config.training.learning_rate, num_steps=1000)
    state = train.init_state(random_params(net, shape), optimizer)
    return Subject(net, loss_fn, train.make_train_step(loss_fn, optimizer, ema_decay=0.999), state, shape)


def random_params(net, shape: tuple[int, ...], y=None):
    """Parameters that are all random, those of a fresh network have zeros in them; drawn without compiling."""
    rng = np.random.default_rng(0)

    def draw(p: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.standard_normal(p.shape, np.float32) / math.sqrt(math.prod(p.shape[:-1])))

    return jax.tree.map(draw, jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape), jnp.ones(shape[0]), y))


DDPMPP, DIGITS_UNET = "DDPM++, CIFAR-10, batch 8", "digits U-Net, batch 64"
SUBJECTS = {
    DDPMPP: lambda: subject("vp_cifar", CIFAR),
    "NCSN++, CIFAR-10, batch 8": lambda: subject("ve_cifar:ncsnpp", CIFAR),
    "DDPM, CIFAR-10, batch 8": lambda: subject("ddpm_cifar", CIFAR),
    DIGITS_UNET: lambda: subject("vp_digits", DIGITS),
    "DiT-S/2, CIFAR-10, batch 8": lambda: subject("vp_cifar", CIFAR, name="DiT"),
}
# In bfloat16, on accelerators.
LARGE = {
    "DDPM++, CIFAR-10, batch 128": lambda: subject("vp_cifar", (128, 32, 32, 3), dtype="bfloat16"),
    "DiT-B/2, 32x32x4, batch 128": lambda: subject(
        "vp_cifar", (128, 32, 32, 4), name="DiT", width=768, heads=12, dtype="bfloat16"
    ),
}


def stepping(it: Subject, batch: dict, steps: int = 1):
    """Training steps on one batch, each run going on where the last one ended, from a copy of the first state."""
    state = jax.tree.map(jnp.copy, it.state)

    def run():
        nonlocal state
        for _ in range(steps):
            state, metrics = it.step(state, jax.random.key(0), batch)
        return metrics

    return run


def batches(shape: tuple[int, ...]):
    """The pipeline over random images of such batches."""
    images = np.random.default_rng(0).integers(0, 256, (50_000, *shape[1:]), np.uint8)
    dataset = data.Dataset(len(images), shape[1:], lambda indices: (images[indices], np.zeros(len(indices), np.int32)))
    return data.batches(dataset, shape[0], seed=0)
