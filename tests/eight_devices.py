"""What `test_sharding.py` runs in a process that has eight devices."""

import importlib
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_cases import CASES
from jax.sharding import AxisType, PartitionSpec
from test_experiment import tiny

from score_jax import experiment, sharding

MESHES = {"one": {"data": 1}, "data": {"data": 8}, "fsdp": {"data": 1, "fsdp": 8}, "both": {"data": 2, "fsdp": 4}}


def config_on(name, **training):
    config = tiny()
    config.network.features = 32  # Parameters worth dividing.
    config.mesh.update(MESHES[name])
    config.training.update(batch_size=16, num_steps=20, log_every=1, checkpoint_every=10, **training)
    config.sampling.update(num_samples=21, batch_size=11)  # Neither divides by eight.
    return config


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("meshes")
    for name in MESHES:
        with jax.log_compiles(False):
            experiment.run(config_on(name), "train", root / name)
    return root


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_eight_devices_train_and_sample_as_one_does(name, workdirs):
    """Losses of 20 steps to 1e-5; every state to 1e-4 of its largest value, samples to a grey level."""
    np.testing.assert_allclose(losses(workdirs / name), losses(workdirs / "one"), rtol=1e-5)
    images = [np.load(workdirs / n / "samples/step_20.npz")["arr_0"].astype(int) for n in (name, "one")]
    assert images[0].shape == (21, 8, 8, 1)
    assert np.abs(images[0] - images[1]).max() <= 1


def test_samples_are_the_same_to_a_thousandth(workdirs, tmp_path):
    config = config_on("one")
    drawn = []
    for name in MESHES:
        run = experiment.Run(config_on(name), workdirs / name)
        state = jax.device_put(experiment.Run(config, workdirs / "one").restore()[1].ema, run.shardings.ema)
        y = sharding.put(run.mesh, np.zeros(16, np.int32))
        x = jax.jit(run.draw, out_shardings=sharding.of_batch(run.mesh))(
            state, None, run.key_sample, y, run.grid(state)
        )
        assert len(x.sharding.device_set) == run.mesh.size
        drawn.append(np.asarray(x))
    for x in drawn[1:]:
        np.testing.assert_allclose(x, drawn[0], atol=1e-3)


# Of numbers on the host, and what is no function of arrays.
OTHERS = {"sample", "langevin_step_size", "largest_distance", "level_ratio"}


@pytest.mark.parametrize("module", CASES)
def test_the_core_works_under_pmap_and_shard_map(module):
    """On eight devices, each with a key and a batch of its own, as on one after the other."""
    public = importlib.import_module(f"score_jax.{module}")
    functions = {n for n in public.__all__ if inspect.isfunction(getattr(public, n))}
    assert functions - OTHERS == set(CASES[module])

    def everything(key, x):
        return {name: case(key, x) for name, case in CASES[module].items()}

    keys, x = jax.random.split(jax.random.key(0), 8), jax.random.normal(jax.random.key(1), (8, 4, 2))
    jitted = jax.jit(everything)
    expected = jax.tree.map(lambda *parts: np.stack(parts), *(jitted(*pair) for pair in zip(keys, x, strict=True)))

    def one(keys, x):
        return jax.tree.map(lambda a: jnp.asarray(a)[None], everything(keys[0], x[0]))

    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    # The loops of diffrax and blackjax do not pass the check of what varies with the device.
    check = module not in ("ode", "likelihood", "mcmc")
    spec = PartitionSpec("i")
    sharded = jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check)
    for mapped in (jax.pmap(everything), jax.jit(sharded)):
        found = mapped(keys, x)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())
