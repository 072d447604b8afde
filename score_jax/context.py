"""What every mode of an experiment needs."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from score_jax import checkpoint, data, lookup, parameterization, processes, provenance, samplers, sharding, train
from score_jax.adopt import adopt, load_params, unread
from score_jax.build import (
    is_classifier,
    make_grid,
    make_guided_score_fn,
    make_log_likelihood,
    make_network,
    make_sampler,
    make_sde,
    num_classes,
    open_data,
    resolve,
    sampling_sde,
)
from score_jax.errors import UserError
from score_jax.objective import check_jumps, check_teacher, has_teacher, make_loss
from score_jax.sample_files import SampleFile, save_samples
from score_jax.schema import check_numbers
from score_jax.sde import sample_prior
from score_jax.workdir import open_workdir, read_config, sole_writer

__all__ = ["Run"]


@dataclasses.dataclass
class Run:
    """An opened experiment: the objects that its config names, and the training state's shape.

    Attributes:
      config: the experiment.
      workdir: where its files lie.
      pretrained: a published checkpoint to start from, where the workdir has none of its own; '' for none.
      lends: whether it is opened by another run, for its parameters.
      retune: whether to go on with other values of `workdir.TUNED`.
    """

    config: ConfigDict
    workdir: pathlib.Path
    pretrained: str = ""
    lends: bool = False
    retune: bool = False

    def __post_init__(self):
        check_numbers(self.config)
        if self.pretrained:
            self.config = adopt(self.config, pathlib.Path(self.pretrained))
        try:
            self.dataset = open_data(self.config, "train")
        except UserError as error:
            if not self.pretrained:
                raise
            self.dataset = unread(self.config, error)
        self.config = config = resolve(self.config, self.dataset)
        self.mesh = lookup.call(sharding.make_mesh, field="config.mesh", **config.mesh)
        self.sde, self.network = make_sde(config), make_network(config)
        self.sampling_sde = sampling_sde(config, self.sde)
        # One split: `fold_in(key, i)` and `split(key)[i]` are the same key.
        self.key_params, self.key_train, self.key_sample, self.key_grid = jax.random.split(
            jax.random.key(config.seed), 4
        )
        self.optimizer = train.make_optimizer(
            config.training.learning_rate,
            num_steps=config.training.num_steps,
            warmup_steps=config.training.warmup_steps,
            grad_clip=config.training.grad_clip,
            decay=config.training.decay,
        )
        # Mistakes fail here, before any work.
        self.classes, self.classifier = num_classes(config), None
        if not is_classifier(config) and not self.lends:
            self.check_sampling()
        self.state = self.state_without_values()
        self.shardings = sharding.of_state(self.mesh, self.state, self.tensor_axes())
        self.state = jax.tree.map(lambda s, where: s.update(sharding=where), self.state, self.shardings)
        loss_fn = make_loss(config, self.sde, self.network)
        batch = {"x": jnp.zeros((1, *self.dataset.shape)), "y": jnp.zeros(1, jnp.int32)}
        params = self.state.params
        lookup.call(lambda: jax.eval_shape(loss_fn, params, self.key_train, batch, params), field="config.training")
        if self.pretrained:
            self.params = load_params(pathlib.Path(self.pretrained), self.network, self.dataset.shape)
        begun = (self.workdir / "config.yaml").exists()
        if not multihost_utils.broadcast_one_to_all(np.array(begun)):
            self.teacher  # noqa: B018  What is wrong with it is told before there is a workdir.
        if jax.process_index() == 0:
            open_workdir(self.workdir, config.to_dict(), retune=self.retune)
        multihost_utils.sync_global_devices("the workdir is there")

    def state_without_values(self) -> train.TrainState:
        """The shapes of the state; where a network would take images of another size, its error says so."""
        try:
            return lookup.call(lambda: jax.eval_shape(self.init_state), field="config.network")
        except UserError as error:
            height, width, channels = self.dataset.shape if len(self.dataset.shape) == 3 else (0, 0, 0)
            if not height or self.config.data.image_size:
                raise
            try:
                jax.eval_shape(lambda: self.init_state((64, 64, channels)))
            except ValueError:
                raise error from None
            advice = "set config.data.image_size, 64 say"
            raise UserError(f"{error}; they are {height} x {width} as stored: {advice}") from error

    def init_state(self, shape: tuple[int, ...] = ()) -> train.TrainState:
        x, y = jnp.zeros((1, *(shape or self.dataset.shape))), jnp.zeros(1, jnp.int32)
        params = self.network.init(self.key_params, x, jnp.ones(1), y if num_classes(self.config) else None)
        return train.init_state(params, self.optimizer)

    def first_state(self) -> train.TrainState:
        """The state before any training: fresh, or with the parameters of a teacher or a published checkpoint."""
        params = self.params if self.pretrained else self.teacher
        if params is None:
            return jax.jit(self.init_state, out_shardings=self.shardings)()
        init = functools.partial(train.init_state, optimizer=self.optimizer)
        return jax.jit(init, out_shardings=self.shardings)(params)

    def tensor_axes(self) -> dict[str, int]:
        """How the network's parameters divide over the mesh's axis `tensor`."""
        axes = getattr(self.network, "TENSOR_AXES", {})
        if self.mesh.shape["tensor"] > 1 and not axes:
            raise UserError(f"config.mesh.tensor: a {self.config.network.name} does not divide over it; use fsdp")
        return axes

    def check_sampling(self) -> None:
        config, sde = self.config, self.sampling_sde
        for part in ("sampler", "corrector"):
            if config.sampling[part].get("batch_averaged"):
                raise UserError(
                    f"config.sampling.{part}.batch_averaged: a sample does not depend on its batch here: leave it out"
                )
        if config.sampling.guidance.name == "classifier_guidance":
            self.classes, self.classifier = self.load_classifier()
        score_fn = make_guided_score_fn(config, sde, self.network, None, jnp.zeros(1, jnp.int32), self.classifier)
        make_sampler(config, sde, score_fn)
        check_jumps(config, self.sde)
        example = jnp.zeros((2, *self.dataset.shape))
        jax.eval_shape(lambda: make_grid(config, sde, lambda x, t: x, example))

    def load_classifier(self) -> tuple[int, jax.tree_util.Partial]:
        """The number of classes and `classifier(y, x, t) -> [batch]`, log p(y | x_t), of a run that trained one."""
        field = "sampling.guidance.classifier"
        other = self.other(field, "a trained classifier", ("sde", "data.name", "data.image_size", "data.centered"))
        if not is_classifier(other.config):
            raise UserError(f"config.{field}: {other.workdir} holds no classifier, but a {other.config.network.name}")

        def log_likelihood(params: Any, y: Array, x: Array, t: Array) -> Array:
            return make_log_likelihood(other.config, other.sde, other.network, params, y)(x, t)

        return num_classes(other.config), jax.tree_util.Partial(log_likelihood, other.restore()[1].ema)

    @functools.cached_property
    def teacher(self) -> Any:
        """The parameters of the network that is distilled, of another run or of `pretrained`; otherwise None."""
        if not has_teacher(self.config):
            return None
        field = "training.distillation.teacher"
        if self.pretrained and not self.config.training.distillation.teacher:
            params = self.params
        else:
            same = "sde", "network.name", "parameterization", "conditioning", "num_levels", "data.centered"
            other = self.other(field, "the network to distil", same)
            check_teacher(self.config, other.config)
            if other.dataset.shape != self.dataset.shape:
                raise UserError(f"config.{field}: of data {other.dataset.shape} there and {self.dataset.shape} here")
            params = other.restore()[1].ema
        return jax.device_put(params, self.shardings.params)

    def other(self, field: str, what: str, same: tuple[str, ...]) -> "Run":
        """The run whose workdir a field of the config names, if it is like this one in some others, on its devices."""
        path = functools.reduce(getattr, field.split("."), self.config)
        if not path or not (file := pathlib.Path(path) / "config.yaml").exists():
            raise UserError(f"config.{field} must be the workdir of {what}, and there is no run in {path!r}")
        config = ConfigDict(read_config(file.parent))
        devices = self.mesh.shape  # Other networks may not divide over the axis `tensor`.
        config.mesh = dict(data=devices["data"] * devices["tensor"], fsdp=devices["fsdp"], tensor=1)
        config.distributed = self.config.distributed
        other = Run(config, pathlib.Path(path), lends=True)
        configs = [json.loads(json.dumps(run.config.to_dict())) for run in (self, other)]  # Without tuples, as YAML.
        for name in same:
            here, there = (functools.reduce(dict.get, name.split("."), config) for config in configs)
            if here != there:
                raise UserError(f"config.{field}: {path} has another config.{name}: {there} there and {here} here")
        return other

    def restore(self) -> tuple[int, train.TrainState]:
        """The newest checkpoint's step and state."""
        with checkpoint.open_manager(self.workdir / "checkpoints") as manager:
            if found := checkpoint.restore_newest(manager, self.state, set_aside=False):
                if self.pretrained:
                    print(f"{self.workdir} has a checkpoint of its own, which stands for {self.pretrained}")
                return found[:2]
        if self.pretrained:
            return 0, self.first_state()
        raise UserError(f"{self.workdir} has no checkpoint: train first, with --mode=train")

    def grid(self, params: Any) -> Array:
        """The times that sampling walks, `[num_steps + 1]`; where they are learned, from 64 paths."""
        config, sde = self.config, self.sampling_sde

        def make(params: Any, classifier: Any) -> Array:
            y = jnp.arange(64) % (self.classes or 1)
            x = sample_prior(self.key_grid, sde, (len(y), *self.dataset.shape))
            return make_grid(config, sde, make_guided_score_fn(config, sde, self.network, params, y, classifier), x)

        return jax.jit(make, out_shardings=sharding.replicated(self.mesh))(params, self.classifier)

    def draw(self, params: Any, classifier: Any, key: Array, numbers: Array, ts: Array) -> Array:
        """The samples of these numbers `[n]`, each a function of its own number alone, in the data's own range.

        They are drawn as batches of one: keys, step sizes and norms are each sample's own.
        """
        return jax.vmap(lambda number: self.draw_one(params, classifier, key, number, ts))(numbers)

    def draw_one(self, params: Any, classifier: Any, key: Array, number: Array, ts: Array) -> Array:
        """A sample; its label is number % classes."""
        config, sde = self.config, self.sampling_sde
        y = jnp.reshape(number % (self.classes or 1), 1)
        score_fn = make_guided_score_fn(config, sde, self.network, params, y, classifier)
        key_prior, key_steps = jax.random.split(jax.random.fold_in(key, number))
        x = sample_prior(key_prior, sde, (1, *self.dataset.shape))
        x = samplers.sample(key_steps, make_sampler(config, sde, score_fn), x, ts)
        return (parameterization.tweedie(sde, score_fn, x, sde.t_min) if config.sampling.denoise else x)[0]

    @contextlib.contextmanager
    def samples(self, step: int, params: Any, num_samples: int) -> Iterator[np.ndarray]:
        """Samples as stored, `[num_samples, ...]`, images uint8; the label of sample i is i % classes.

        They go to a file as they are made, where a run that was killed finds them again; in the end it is removed.

        Raises:
          UserError: if another process samples in the directory; if they are not finite.
        """
        first = jax.process_index() == 0
        alone = sole_writer(self.workdir, doing="sampling") if first else contextlib.nullcontext()
        with alone, processes.resumable("stopped in sampling; the same command goes on after the samples on disk"):
            file = self.sample_file(step, params, num_samples)
            multihost_utils.sync_global_devices("the samples are there")
            yield file.open()
            multihost_utils.sync_global_devices("the samples are read")
            if first:
                file.remove()

    def sample_file(self, step: int, params: Any, num_samples: int) -> SampleFile:
        config, shape, first = self.config, (num_samples, *self.dataset.shape), jax.process_index() == 0
        compiled, ts = jax.jit(self.draw, out_shardings=sharding.of_batch(self.mesh)), self.grid(params)
        what = {"step": step, "pretrained": self.pretrained, **config.sampling.to_dict()}
        file = SampleFile(self.workdir)
        done = file.start(shape, np.uint8 if len(shape) == 4 else np.float32, what) if first else 0
        done = int(multihost_utils.broadcast_one_to_all(np.array(done)))
        parts = data.chunks(num_samples, config.sampling.batch_size, multiple=sharding.num_shards(self.mesh))
        for part, count in parts:
            if part[0] >= done:
                x = compiled(params, self.classifier, self.key_sample, sharding.put(self.mesh, part), ts)
                x = sharding.to_host(x)[:count]
                self.check_finite(x, part, params, ts)
                if first:
                    file.append(data.to_uint8(x, centered=config.data.centered) if x.ndim == 4 else x)
        return file

    def check_finite(self, x: np.ndarray, numbers: np.ndarray, params: Any, ts: Array) -> None:
        bad = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1)
        if not bad.any():
            return
        try:  # Outside `jit` the loop knows where.
            self.draw_one(params, self.classifier, self.key_sample, jnp.asarray(numbers[bad.argmax()]), ts)
        except FloatingPointError as error:
            raise UserError(f"{error} (config.sampling)") from error
        raise UserError("the samples are not finite after the last, denoising step (config.sampling.denoise)")

    def num_evaluations(self) -> int | None:
        """How often sampling evaluates the score, with its guidance; None where that depends on the samples."""
        config, sde = self.config, self.sampling_sde

        def evaluate_score(x: Array, t: Array) -> Array:
            return x

        def step(x: Array, t: Array) -> Array:
            sampler = make_sampler(config, sde, jax.jit(evaluate_score))
            return sampler.step(self.key_sample, x, t, t, sampler.init(x, t))[0]

        jaxpr = jax.make_jaxpr(step)(jnp.zeros((1, *self.dataset.shape)), jnp.asarray(sde.t_max))
        calls = provenance.count_calls(jaxpr.jaxpr, evaluate_score.__name__) * config.sampling.num_steps
        return None if math.isnan(calls) else int(calls) + bool(config.sampling.denoise)

    def write_samples(self, step: int, params: Any) -> None:
        with self.samples(step, params, self.config.sampling.num_samples) as samples:
            if jax.process_index() == 0:
                made = provenance.of_samples(
                    self.config.to_dict(), step, self.pretrained, evaluations=self.num_evaluations()
                )
                print("samples:", save_samples(self.workdir, step, samples, made))
