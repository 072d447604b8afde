"""The modes that edit images: each shows the original, what was left of it, and what the model makes of that."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from score_jax import data, disk, inverse, lookup, operators, parameterization, provenance, replacement, samplers
from score_jax.build import make_guided_score_fn, make_sampler, open_data
from score_jax.context import Run
from score_jax.errors import UserError, nearest
from score_jax.files import read_images
from score_jax.sample_files import save_edits
from score_jax.sde import ScoreFn, sample_prior
from score_jax.sharding import num_shards, put, to_host

__all__ = ["colorize", "inpaint", "interpolate", "restore"]

# `edit(key, score_fn, x, ts) -> (degraded, restored, misfit)` of a batch of one, the first two in the shape of `x`.
Edit = Callable[[Array, ScoreFn, Array, Array], tuple[Array, Array, Array]]

# What a mask hides, from the places in units of height and width.
MASKS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "center": lambda down, along, rng: (np.abs(down - 0.5) < 0.25) & (np.abs(along - 0.5) < 0.25),
    "left": lambda down, along, rng: (along < 0.5) & (down < 1),
    "random": lambda down, along, rng: rng.random((len(down), along.shape[1])) < 0.5,
}


def inpaint(run: Run) -> None:
    """Hide a part of images and fill it in, with the sampler of the config (score_jax.replacement)."""
    sde, config, mask = run.sampling_sde, run.config, _mask(run)

    def edit(key: Array, score_fn: ScoreFn, x: Array, ts: Array) -> tuple[Array, Array, Array]:
        key_prior, key = jax.random.split(key)
        sampler, start = make_sampler(config, sde, score_fn), sample_prior(key_prior, sde, x.shape)
        denoise = config.sampling.denoise
        restored = replacement.inpaint(key, sde, score_fn, sampler, start, ts, x, mask, denoise=denoise)
        return jnp.where(mask, x, 0.0 if config.data.centered else 0.5), restored, jnp.zeros(1)

    _edit(run, "inpaint", edit)


def colorize(run: Run) -> None:
    """Take the color from images and give it back, with the sampler of the config (score_jax.replacement)."""
    sde, config, channels = run.sampling_sde, run.config, _image_shape(run)[-1]
    if channels == 1:
        raise UserError(f"--mode=colorize needs images in color, but those of {config.data.name!r} have one channel")

    def edit(key: Array, score_fn: ScoreFn, x: Array, ts: Array) -> tuple[Array, Array, Array]:
        key_prior, key = jax.random.split(key)
        sampler, start = make_sampler(config, sde, score_fn), sample_prior(key_prior, sde, x.shape)
        denoise, grey = config.sampling.denoise, operators.decolorize()(x)
        restored = replacement.colorize(key, sde, score_fn, sampler, start, ts, grey, denoise=denoise)
        return jnp.broadcast_to(grey, x.shape), restored, jnp.zeros(1)

    _edit(run, "colorize", edit)


def restore(run: Run) -> None:
    """Measure images, with noise, and restore them by the score of the posterior (score_jax.inverse)."""
    sde, config, editing = run.sampling_sde, run.config, run.config.editing
    forward = _operator(run)
    field = "config.editing.method"
    method = lookup.find(inverse, editing.method.name, field, takes="sde, score_fn, y, forward")

    def edit(key: Array, score_fn: ScoreFn, x: Array, ts: Array) -> tuple[Array, Array, Array]:
        key_noise, key_prior, key = jax.random.split(key, 3)
        y = forward(x)
        y = y + editing.noise_std * jax.random.normal(key_noise, y.shape)
        if editing.operator.name == operators.mask.__name__:
            y = forward(y)  # What is hidden is not measured, and has no noise.
        fields = {"noise_std": editing.noise_std, "bounds": _range(config), **lookup.fields(editing.method)}
        score_fn = lookup.call(method, sde, score_fn, y, forward, field=field, **fields)
        start = sample_prior(key_prior, sde, x.shape)
        restored = samplers.sample(key, make_sampler(config, sde, score_fn), start, ts)
        if config.sampling.denoise:
            restored = parameterization.tweedie(sde, score_fn, restored, sde.t_min)
        # Of a draw from the posterior y - A x has the law of the noise.
        measured = forward(jnp.ones_like(x)) != 0
        misfit = jnp.sqrt(jnp.mean((y - forward(restored)) ** 2, axis=(1, 2, 3), where=measured))
        for axis in (1, 2, 3):  # What is smaller is shown enlarged.
            y = jnp.repeat(y, x.shape[axis] // y.shape[axis], axis)
        return y, restored, misfit

    _edit(run, "restore", edit)


def interpolate(run: Run) -> None:
    """Walk from each image to the next one, pair by pair, on the sphere of their latent codes (score_jax.ode)."""
    from score_jax.ode import ode_encode, ode_sample, spherical  # Here, as diffrax takes a second to import.

    config, sde, editing = run.config, run.sampling_sde, run.config.editing
    step, state = run.restore()
    images, labels = _images(run)
    if len(images) < 2:
        raise UserError(f"--mode=interpolate needs 2 images or more (config.editing.images), got {len(images)}")
    x = data.to_float(images[: len(images) // 2 * 2], centered=config.data.centered)
    pairs = x.reshape(-1, 2, *x.shape[1:]), labels[: len(x)].reshape(-1, 2)
    weights = np.linspace(0, 1, editing.num_between + 2)
    tolerance = {name: config.evaluation.likelihood[name] for name in ("rtol", "atol", "solver")}

    def score(params: Any, classifier: Any, y: Array) -> ScoreFn:
        return make_guided_score_fn(config, sde, run.network, params, y, classifier)

    @jax.jit
    def encode(params: Any, classifier: Any, x: Array, y: Array) -> Array:
        return ode_encode(sde, score(params, classifier, y), sde.alpha(sde.t_min) * x, **tolerance)

    @jax.jit
    def decode(params: Any, classifier: Any, first: Array, second: Array, weight: Array, y: Array) -> Array:
        score_fn, latent = score(params, classifier, y), editing.temperature * spherical(first, second, weight)
        return parameterization.tweedie(sde, score_fn, ode_sample(sde, score_fn, latent, **tolerance), sde.t_min)

    model, chunks = (state.ema, run.classifier), []
    for part, count in data.chunks(len(pairs[0]), config.sampling.batch_size, multiple=num_shards(run.mesh)):
        ends = [put(run.mesh, tuple(both[part, i] for both in pairs)) for i in (0, 1)]
        codes = [encode(*model, x, y) for x, y in ends]
        chunks.append([to_host(decode(*model, *codes, w, ends[int(w >= 0.5)][1]))[:count] for w in weights])
    shown = {f"{w:.2f}": np.concatenate(part) for w, part in zip(weights, zip(*chunks, strict=True), strict=True)}
    if not all(np.isfinite(part).all() for part in shown.values()):
        raise UserError("interpolate: the ODE solver gave up: loosen config.evaluation.likelihood.rtol and atol")
    _show(run, "interpolate", step, shown)


def _edit(run: Run, mode: str, edit: Edit) -> None:
    """Edit the images of the config, each with a key of its own, and write before and after."""
    config = run.config
    step, state = run.restore()
    images, labels = _images(run)

    def one(params: Any, classifier: Any, key: Array, ts: Array, number: Array, x: Array, y: Array) -> Any:
        score_fn = make_guided_score_fn(config, run.sampling_sde, run.network, params, y[None], classifier)
        return jax.tree.map(lambda a: a[0], edit(jax.random.fold_in(key, number), score_fn, x[None], ts))

    compiled = jax.jit(jax.vmap(one, in_axes=(None, None, None, None, 0, 0, 0)))
    x = data.to_float(images, centered=config.data.centered)
    ts, chunks = run.grid(state.ema), []
    for part, count in data.chunks(len(x), config.sampling.batch_size, multiple=num_shards(run.mesh)):
        inputs = put(run.mesh, (part, x[part], labels[part]))
        chunks.append([to_host(a)[:count] for a in compiled(state.ema, run.classifier, run.key_sample, ts, *inputs)])
    degraded, restored, misfit = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    _count_failures(run, mode, step, restored, misfit)
    shown = {"original": x, "degraded": degraded, "restored": restored}
    _show(run, mode, step, shown)


def _count_failures(run: Run, mode: str, step: int, restored: np.ndarray, misfit: np.ndarray) -> None:
    """Say, and write to `<mode>.json`, how many images do not fit their measurement or left the range of the data.

    Args:
      run: of the images.
      mode: what made them.
      step: of the network.
      restored: what it made, `[n, ...]`.
      misfit: the root mean square of y - A x, `[n]`.

    Raises:
      UserError: if some are not finite.
    """
    (low, high), noise_std, n = _range(run.config), run.config.editing.noise_std, len(restored)
    flat = restored.reshape(n, -1)
    if lost := int((~np.isfinite(flat)).any(axis=1).sum()):
        raise UserError(f"{mode}: {lost} of {n} images are not finite: take more config.sampling.num_steps")
    width, most = high - low, 2 * max(noise_std, 0.01 * (high - low))
    outside = (flat < low - width / 2) | (flat > high + width / 2)
    numbers: dict[str, float] = {"step": step, "images": n, "off_range": int(outside.any(axis=1).sum())}
    if mode == restore.__name__:
        numbers |= {"median_misfit": float(np.median(misfit)), "misfits": int((misfit > most).sum())}
    if jax.process_index() == 0:
        disk.replace(run.workdir / f"{mode}.json", json.dumps(numbers, indent=1) + "\n")
    if numbers.get("misfits"):
        print(
            f"{mode}: {numbers['misfits']} of {n} images do not fit their measurements: |y - A x| is above {most:.3g}, "
            f"root mean square, for config.editing.noise_std={noise_std:.3g}; take more config.sampling.num_steps"
        )
    if numbers["off_range"]:
        print(
            f"{mode}: {numbers['off_range']} of {n} images leave the range of the data, [{low:g}, {high:g}], by more "
            "than half its width; take more config.sampling.num_steps"
        )


def _range(config: ConfigDict) -> tuple[float, float]:
    """That of the data."""
    return (-1.0 if config.data.centered else 0.0), 1.0


def _show(run: Run, mode: str, step: int, images: dict[str, np.ndarray]) -> None:
    if jax.process_index() == 0:
        made = provenance.of_editing(mode, run.config.to_dict(), step, run.pretrained)
        print(f"{mode}:", save_edits(run.workdir, mode, step, images, centered=run.config.data.centered, made=made))


def _image_shape(run: Run) -> tuple[int, int, int]:
    if len(run.dataset.shape) != 3:
        raise UserError(f"config.data.name: editing needs images, and {run.config.data.name!r} has none")
    return run.dataset.shape


def _images(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The uint8 images to edit, in the network's size, and their labels."""
    config, shape = run.config, _image_shape(run)
    if not config.editing.images:
        test = open_data(config, "test", classes=run.classes)
        return test.read(np.arange(min(test.size, config.sampling.num_samples)))
    if run.classes:
        raise UserError("config.editing.images: the network is told classes, and files have none; '' is the test split")
    images = read_images(pathlib.Path(config.editing.images), shape, background=config.data.get("background") or None)
    return images, np.zeros(len(images), np.int32)


def _mask(run: Run) -> Array:
    """True where images are known, `[1, h, w, 1]`."""
    height, width, _ = _image_shape(run)
    name = run.config.editing.mask
    if name in MASKS:
        down, along = (np.arange(size) / size + 0.5 / size for size in (height, width))
        hidden = MASKS[name](down[:, None], along[None, :], np.random.default_rng(run.config.seed))
    elif pathlib.Path(name).is_file():
        hidden = read_images(pathlib.Path(name), (height, width, 1))[0, :, :, 0] < 128  # What is transparent is white.
        if hidden.all() or not hidden.any():
            what = "everything" if hidden.all() else "nothing"
            raise UserError(f"config.editing.mask: {name} hides {what}: what is black and opaque is hidden")
    else:
        raise UserError(f"config.editing.mask: neither a mask nor a file: {name!r}{nearest(name, MASKS)}")
    return jnp.asarray(~hidden).reshape(1, height, width, 1)


def _operator(run: Run) -> operators.Operator:
    """The measurement of the config, tried on the shape of the images."""
    operator, field = run.config.editing.operator, "config.editing.operator"
    make = lookup.find(operators, operator.name, field, takes="")
    arguments = (_mask(run),) if make is operators.mask else ()
    forward = lookup.call(make, *arguments, field=field, **lookup.fields(operator))
    example = jnp.zeros((1, *_image_shape(run)))
    lookup.call(lambda: jax.eval_shape(forward, example), field=field)
    return forward
