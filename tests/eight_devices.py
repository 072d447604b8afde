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
from test_experiment import tiny, untrained

from score_jax import experiment, sharding, train
from score_jax.errors import UserError
from score_jax.networks import DiT

MESHES = {"one": {"data": 1}, "eight": {"data": 2, "fsdp": 4}}


def config_on(mesh, **training):
    config = tiny()
    config.network.features = 32  # Parameters worth dividing.
    config.mesh.update(mesh)
    config.training.update(batch_size=16, num_steps=20, log_every=1, checkpoint_every=10, **training)
    config.sampling.update(num_samples=21, batch_size=11)  # Neither divides by eight.
    return config


@pytest.fixture(scope="module")
def steps():
    return []


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory, steps):
    """A run on each mesh; `steps` are their training steps."""
    root, make = tmp_path_factory.mktemp("meshes"), train.make_train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_train_step", lambda *a, **k: steps.append(make(*a, **k)) or steps[-1])
        for name, mesh in MESHES.items():
            experiment.run(config_on(mesh), "train", root / name)
    return root


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_eight_devices_train_as_one_does(workdirs, steps):
    """Losses of 20 steps to 1e-5, and one compilation."""
    np.testing.assert_allclose(losses(workdirs / "eight"), losses(workdirs / "one"), rtol=1e-5)
    assert [step._cache_size() for step in steps] == [1, 1]


def test_eight_devices_sample_as_one_does(workdirs):
    """The same parameters: to 1e-3; each run's own: to a grey level."""
    images = [np.load(workdirs / name / "samples/step_20.npz")["arr_0"].astype(int) for name in MESHES]
    assert images[0].shape == (21, 8, 8, 1)
    assert np.abs(images[0] - images[1]).max() <= 1
    params = experiment.Run(config_on(MESHES["one"]), workdirs / "one").restore()[1].ema
    drawn = []
    for name, mesh in MESHES.items():
        run = experiment.Run(config_on(mesh), workdirs / name)
        params = jax.device_put(params, run.shardings.ema)
        numbers = sharding.put(run.mesh, np.arange(16))
        draw = jax.jit(run.draw, out_shardings=sharding.of_batch(run.mesh))
        drawn.append(draw(params, None, run.key_sample, numbers, run.grid(params)))
        assert len(drawn[-1].sharding.device_set) == run.mesh.size
    np.testing.assert_allclose(*map(np.asarray, drawn), atol=1e-3)


def test_a_run_goes_on_on_another_number_of_devices(workdirs, tmp_path):
    """Ten steps on one device and ten on eight, against twenty on one: the same batches, losses to 1e-6, then 1e-5.

    Parameters without effect, the bias of attention's keys, have a gradient of rounding errors only, which Adam
    enlarges: they differ, and nothing else shows it.
    """
    config = config_on(MESHES["one"])
    for config.training.num_steps, mesh in ((10, "one"), (20, "eight")):
        config.mesh.update(data=-1, fsdp=1)
        config.mesh.update(MESHES[mesh])
        experiment.run(config, "train", tmp_path)
    resumed, whole = losses(tmp_path), losses(workdirs / "one")
    assert resumed[:10] == whole[:10]
    np.testing.assert_allclose(resumed[10], whole[10], rtol=1e-6)
    np.testing.assert_allclose(resumed[11:], whole[11:], rtol=1e-5)


def test_evaluation_and_likelihood_are_those_of_one_device(workdirs):
    """On each mesh with the same parameters."""
    tables, workdir = [], workdirs / "one"
    for mesh in MESHES.values():
        config = config_on(mesh)
        config.sampling.batch_size = 8
        config.evaluation.likelihood.update(rtol=1e-2, atol=1e-2)  # Steps that are not at the solver's stability limit.
        for mode, config.evaluation.num_samples in (("likelihood", 16), ("evaluate", 13)):
            experiment.run(config, mode, workdir)
        numbers = json.loads((workdir / "likelihood.json").read_text())
        table = json.loads((workdir / "evaluation.json").read_text())
        tables.append(numbers | {key: row["generated"] for key, row in table.items()})
    assert (tables[0]["num_images"], tables[0]["num_samples"]) == (16, 13)
    for key, value in tables[0].items():
        # Rounding changes the solver's steps, if little, and by more the spread of an image's bits.
        rel = 5e-3 if key == "standard_error" else 1e-3
        assert tables[1][key] == pytest.approx(value, rel=rel, abs=1e-4), key


def test_a_teacher_of_one_device_is_divided_as_its_student_is(workdirs, tmp_path):
    config = config_on({"data": 2, "fsdp": 4}, objective="consistency_distillation")
    config.training.distillation.update(teacher=str(workdirs / "one"), grid="log_snr", num_steps=4)
    config.sampling.update(sampler={"name": "consistency"}, t_min=1e-5, denoise=False)
    run = experiment.Run(config, tmp_path)
    for teacher, student in zip(jax.tree.leaves(run.teacher), jax.tree.leaves(run.first_state().params), strict=True):
        assert teacher.sharding == student.sharding
        np.testing.assert_array_equal(teacher, student)


def test_a_run_of_more_devices_than_there_are_lends_its_network(workdirs, tmp_path):
    """A classifier made on 16 devices, say, guides a network that divides over `tensor`, which it does not."""
    classifier = tiny("classifier_digits")
    classifier.network.update(features=4, multipliers=(1,))
    file = untrained(classifier, tmp_path / "classifier") / "config.yaml"
    file.write_text(file.read_text().replace("data: -1", "data: 16"))
    config = config_on({"data": 2, "tensor": 4})
    config.network = dict(name="DiT", width=16, depth=1, heads=4)
    config.sampling.guidance.update(name="classifier_guidance", classifier=str(tmp_path / "classifier"))
    run = experiment.Run(config, tmp_path / "run")
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(run.classifier)} == {8}


def test_fully_sharded_state_is_an_eighth(tmp_path):
    """Of parameters, average and optimizer at most 1/7 on each device."""
    config = config_on({"data": 1, "fsdp": 8})
    config.training.batch_size = 8
    run = experiment.Run(config, tmp_path)
    state = run.first_state()
    for part in (state.params, state.ema, state.opt_state):
        whole, here = (
            sum(x.nbytes for x in xs) for xs in (jax.tree.leaves(part), map(on_first, jax.tree.leaves(part)))
        )
        assert here <= whole / 7


def on_first(x):
    return x.addressable_shards[0].data


@pytest.mark.parametrize("mesh", [{"data": 4, "tensor": 2}, {"data": 1, "fsdp": 2, "tensor": 4}])
def test_a_transformer_divides_its_heads(mesh):
    """The loss and gradient of a DiT whose heads and hidden features are divided are those of one device."""
    network = DiT(width=32, depth=1, heads=4)
    x, t = jax.random.normal(jax.random.key(0), (8, 8, 8, 1)), jnp.linspace(0, 999, 8)
    params = network.init(jax.random.key(1), x, t)
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)

    @jax.jit
    def gradient(params, x, t):
        return jax.value_and_grad(lambda params: jnp.mean(network.apply(params, x, t) ** 2))(params)

    expected = gradient(params, x, t)
    mesh = sharding.make_mesh(**mesh)
    places = sharding.of_state(mesh, params, network.TENSOR_AXES)
    block = places["params"]["Block_0"]
    assert [block[f"Dense_{i}"]["kernel"].spec.index("tensor") for i in range(1, 7)] == [1, 1, 1, 0, 1, 0]
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    found = gradient(jax.device_put(params, places), *sharding.put(mesh, (x, t)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": 3, "fsdp": -1}, "config.mesh: data=3, fsdp=-1, tensor=1 does not divide 8 devices"),
        ({"data": -1, "fsdp": -1}, "one of them may be -1"),
        ({"data": 16}, "asks for 16 devices, and there are 8"),
        ({"tensor": 2}, "config.mesh.tensor: a UNet does not divide over it; use fsdp"),
        ({"dat": 2}, "has no parameter 'dat'; did you mean 'data'?"),
    ],
)
def test_mistakes_in_meshes(settings, words, tmp_path):
    config = tiny()
    with config.unlocked():
        config.mesh.update(settings)
    with pytest.raises(UserError, match=words):
        experiment.run(config, "train", tmp_path)


def test_a_batch_that_does_not_divide(tmp_path):
    with pytest.raises(UserError, match="4 does not divide into accumulate=1 parts for 8 devices"):
        experiment.run(tiny(), "train", tmp_path)


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
