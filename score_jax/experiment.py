"""The modes of `run.py`.  With `build`, `objective` and `context`, which make the objects, they alone read configs."""

import contextlib
import functools
import json
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Collection
from typing import Any

import grain
import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from score_jax import (
    adopt,
    checkpoint,
    data,
    disk,
    edit,
    evaluate,
    features,
    lookup,
    processes,
    provenance,
    report,
    sharding,
    train,
)
from score_jax.build import (
    chosen,
    is_classifier,
    make_net,
    make_network,
    make_sampler,
    make_score_fn,
    make_sde,
    num_classes,
    open_data,
)
from score_jax.context import Run
from score_jax.errors import UserError
from score_jax.log import MetricLog
from score_jax.objective import is_distilled, make_loss
from score_jax.schema import check_numbers, expanded, local_path
from score_jax.workdir import check_place, read_config, record_changes, shared, sole_writer, write_config

__all__ = ["MODES", "make_network", "make_sampler", "make_score_fn", "make_sde", "run"]


MOST_PIXELS = 64 * 64 * 3  # The covariance of more, in float64, takes more than 1.2 GB.


def _train(run: Run) -> None:
    first = jax.process_index() == 0
    with sole_writer(run.workdir) if first else contextlib.nullcontext(), processes.termination() as stopped:
        state = _fit(run, stopped)
    if int(state.step) < run.config.training.num_steps:
        print(f"stopped at step {state.step}; the same command goes on from there")
    elif is_classifier(run.config):
        _evaluate_classifier(run, int(state.step), state.ema)
    else:
        run.write_samples(int(state.step), state.ema)


def _fit(run: Run, stopped: Callable[[int], bool]) -> train.TrainState:
    config, mesh = run.config, run.mesh
    num_steps, batch_size, accumulate = (config.training[n] for n in ("num_steps", "batch_size", "accumulate"))
    if batch_size % (accumulate * sharding.num_shards(mesh)):
        raise UserError(
            f"config.training.batch_size: {batch_size} does not divide into accumulate={accumulate} parts for "
            f"{sharding.num_shards(mesh)} devices"
        )
    run.dataset.read(np.arange(1))  # What cannot be read fails here.
    rows = sharding.local_rows(mesh, batch_size)
    batches = data.batches(run.dataset, batch_size, seed=config.seed, rows=rows)
    with checkpoint.open_manager(run.workdir / "checkpoints") as manager:
        start = 0
        if found := checkpoint.restore_newest(manager, run.state):
            start, state, position = found
            _seek(batches, start, position)
            print(f"resuming {run.workdir} at step {start}")
        else:
            state = run.first_state()
        if jax.process_index() == 0:
            _record(run, start)
        step_fn = train.make_train_step(
            make_loss(config, run.sde, run.network),
            run.optimizer,
            ema_decay=config.training.ema_decay,
            accumulate=accumulate,
            out_shardings=(run.shardings, sharding.replicated(mesh)),
        )
        teacher = run.teacher if start < num_steps else None
        silent = contextlib.nullcontext(lambda step, metrics: None)  # One process writes for all.
        first = jax.process_index() == 0
        with MetricLog(run.workdir, start=start, num_steps=num_steps) if first else silent as log:
            return train.fit(
                lambda state, key, batch: step_fn(state, key, batch, teacher),
                state,
                run.key_train,
                (sharding.put_local(mesh, batch, batch_size) for batch in batches),
                num_steps=num_steps,
                log_every=config.training.log_every,
                checkpoint_every=config.training.checkpoint_every,
                log=log,
                save=lambda step, state: checkpoint.save(manager, step, state, batches.get_state()),
                max_skipped=config.training.max_skipped,
                stopped=stopped,
            )


def _record(run: Run, start: int) -> None:
    """Put the config that training goes on with after step `start` on record, and say what of it is new."""
    config = run.config.to_dict()
    new = config["training"]

    def rate(training: dict[str, Any]) -> float:
        schedule = {name: training[name] for name in ("num_steps", "warmup_steps", "decay")}
        return float(train.learning_rate(training["learning_rate"], **schedule)(start - 1))  # Of the last step.

    if start:
        before, after = rate({**new, **read_config(run.workdir)["training"]}), rate(new)
        if not math.isclose(before, after, rel_tol=1e-3):
            ends = f"the cosine now ends at step {new['num_steps']}: " if new["decay"] == "cosine" else ""
            print(f"{ends}the learning rate at step {start} goes from {before:.2g} to {after:.2g}")
    record_changes(run.workdir, start, config)
    write_config(run.workdir, config)


def _seek(batches: grain.DatasetIterator, step: int, position: Any) -> None:
    """Go to the batch after a step, where the position that the checkpoint holds should be, too."""
    expected = batches.get_state() | {"next_index": step}  # A batch is a function of its number.
    if position != expected:
        print(f"the position in the data, {position!r}, is damaged in the checkpoint of step {step}: it is rebuilt")
    batches.set_state(expected)


def _sample(run: Run) -> None:
    step, state = run.restore()
    run.write_samples(step, state.ema)


def _evaluate(run: Run) -> None:
    config = run.config
    step, state = run.restore()
    if is_classifier(config):
        return _evaluate_classifier(run, step, state.ema)
    batch_size = config.sampling.batch_size
    # Mistakes fail here, before the sampling.
    extractor, test = _extractor(run), open_data(config, "test")
    if config.evaluation.classifier and not extractor and test.num_classes < 2:
        raise UserError(
            f"config.evaluation.classifier: {config.data.name!r} has no two classes to tell apart: set it to False"
        )
    if extractor:
        field, statistics = "config.evaluation.statistics", config.evaluation.statistics
        options = dict(batch_size=batch_size, statistics=statistics, mesh=run.mesh)
        reference = lookup.call(features.reference, extractor, run.dataset, field=field, **options)
    with run.samples(step, state.ema, config.evaluation.num_samples) as generated:
        if extractor:
            table = features.against_data(extractor, generated, reference, test, batch_size=batch_size, mesh=run.mesh)
        else:
            table = evaluate.against_data(
                generated,
                [test] if test.undivided else [run.dataset, test],
                classifier=config.evaluation.classifier,
                labels=np.arange(len(generated)) % run.classes if run.classes else None,
            )
    made = provenance.of_samples(config.to_dict(), step, run.pretrained, evaluations=run.num_evaluations())
    made |= {"features": config.evaluation.features}
    _write(run, "evaluation", table, evaluate.as_text(table), made)


def _extractor(run: Run) -> features.Extractor | None:
    """The network that images are compared by, on every device, if it is not by their pixels."""
    config = run.config
    makers = {"pixels": None, "inception": features.inception, "efficientnet_lite0": features.efficientnet_lite0}
    make = lookup.choose(makers, config.evaluation.features, "config.evaluation.features")
    if not make:
        if (size := math.prod(run.dataset.shape)) > MOST_PIXELS:
            raise UserError(
                f"config.evaluation.features: by their pixels, {size}, images are compared up to {MOST_PIXELS} "
                f"(64x64x3), as more than that takes covariances of many GB: take 'inception', which gives FID"
            )
        return None
    extractor = lookup.call(make, config.evaluation.weights, field="config.evaluation.weights")
    return extractor._replace(apply=jax.device_put(extractor.apply, sharding.replicated(run.mesh)))


def _evaluate_classifier(run: Run, step: int, params: Any) -> None:
    config = run.config

    def logits(params: Any, x: Array, t: Array) -> Array:
        return make_net(config, run.sde, run.network, params)(x, t)

    table = evaluate.accuracy(
        run.key_sample,
        run.sde,
        jax.tree_util.Partial(logits, params),
        open_data(config, "test"),
        num_images=config.evaluation.num_samples,
        batch_size=config.sampling.batch_size,
        centered=config.data.centered,
        mesh=run.mesh,
    )
    _write(run, "accuracy", table, _numbers(table), provenance.of_parameters(config.to_dict(), step))


def _numbers(table: dict[str, float]) -> str:
    return "\n".join(f"{name:28}{value:12.5g}" for name, value in table.items())


def _write(run: Run, name: str, table: dict[str, Any], text: str, made: dict[str, Any]) -> None:
    """Write a table and, beside it, what made it, which is never that of another table; and print it."""
    if jax.process_index() == 0:
        caption = run.workdir / f"{name}.made.json"
        caption.unlink(missing_ok=True)
        disk.replace(run.workdir / f"{name}.json", json.dumps(table, indent=1) + "\n")
        disk.replace(caption, json.dumps(made, indent=1) + "\n")
    print(text)


def _likelihood(run: Run) -> None:
    config, key, fields = run.config, run.key_sample, dict(run.config.evaluation.likelihood)

    def score(params: Any, y: Array, x: Array, t: Array) -> Array:
        return make_score_fn(config, run.sde, run.network, params, y if num_classes(config) else None)(x, t)

    step, state = run.restore()
    make = functools.partial(jax.tree_util.Partial, score, state.ema)
    images = {"centered": config.data.centered, "dequantized": config.data.dequantize}
    if num_steps := fields.pop("dequantizer_steps"):
        key, key_fit = jax.random.split(key)
        fields["dequantizer"] = evaluate.fit_dequantizer(
            key_fit,
            run.sde,
            make,
            run.dataset,
            num_steps=num_steps,
            batch_size=config.training.batch_size,
            **images,
        )
    table = lookup.call(
        evaluate.likelihood,
        key,
        run.sde,
        make,
        open_data(config, "test"),
        field="config.evaluation.likelihood",
        num_images=config.evaluation.num_samples,
        batch_size=config.sampling.batch_size,
        mesh=run.mesh,
        **images,
        **fields,
    )
    _write(run, "likelihood", table, _numbers(table), provenance.of_likelihood(config.to_dict(), step, run.pretrained))


def _export(run: Run) -> None:
    directory, params = run.workdir / "diffusers", jax.tree.map(sharding.to_host, run.restore()[1].ema)
    if jax.process_index() == 0:
        adopt.export(run.config, run.network, params, run.sde, run.dataset.shape[0], directory)
        print("exported:", directory)


MODES: dict[str, Callable[[Run], None]] = {
    f.__name__[1:]: f for f in (_train, _sample, _evaluate, _likelihood, _export)
}
MODES |= {f.__name__: f for f in (edit.inpaint, edit.colorize, edit.restore, edit.interpolate)}


def run(
    config: ConfigDict,
    mode: str,
    workdir: str | pathlib.Path,
    *,
    pretrained: str = "",
    given: Collection[str] = (),
    retune: bool = False,
) -> None:
    """Run a mode of an experiment.

    Args:
      config: the experiment.
      mode: a key of `MODES`.
      workdir: where its files lie; made by `train`.
      pretrained: a published checkpoint, a file or a directory, to start from where the workdir has no checkpoint.
      given: fields of the config that were set by hand, see `build.chosen`.
      retune: whether training may go on with another learning rate, warm-up, clipping or decay than it began with.

    Raises:
      UserError: for any mistake in the arguments, in one line.
    """
    act = lookup.choose(MODES, mode, "--mode")
    if retune and act is not _train:
        raise UserError(f"--retune is for --mode=train, not for --mode={mode}")
    check_numbers(config)
    if is_classifier(config) and act not in (_train, _evaluate):
        raise UserError(f"--mode={mode} needs a score, and this config makes a classifier: there are train, evaluate")
    if is_distilled(config) and act not in (_train, _sample, _evaluate, _export):
        raise UserError(
            f"--mode={mode} needs a score, and {config.training.objective} makes a network of large steps: there are "
            "train, sample, evaluate, export; or take its teacher"
        )
    config, workdir = chosen(expanded(config), given), pathlib.Path(local_path(workdir, "--workdir"))
    check_place(workdir)
    train.tune_cpu()
    lookup.call(processes.initialize, field="config.distributed", **config.distributed)
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(workdir.absolute().parent / ".compilation_cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # Many short ones are a long start.
    # Nothing is lost by that; a disk that is full is told where something is.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    with contextlib.ExitStack() as stack:
        if jax.process_index() > 0:  # One speaks for all.
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        stack.enter_context(
            processes.together(shared(config.to_dict(), mode=mode, pretrained=pretrained, retune=retune))
        )
        try:
            act(Run(config, workdir, local_path(pretrained, "--pretrained"), retune=retune))
            if jax.process_index() == 0:
                print("report:", report.write_report(workdir))
        except OSError as error:
            raise disk.told(error, workdir) from error
