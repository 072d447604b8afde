"""Published networks: outputs equal those of the published code on its own tensors."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from score_jax import pretrained
from score_jax.networks import NCSNv2

DATA = pathlib.Path(__file__).parent / "data"


def reference(name):
    """`(tensors by their published names, everything else)`."""
    with np.load(DATA / f"{name}.npz") as file:
        arrays = dict(file)
    tensors = {n.removeprefix("params/"): arrays.pop(n) for n in list(arrays) if n.startswith("params/")}
    return tensors, arrays


def from_file(name):
    tensors, rest = reference(name)
    if "config" in rest:
        return pretrained.from_score_sde(
            json.loads(str(rest["config"])), traverse_util.unflatten_dict(tensors, sep="/")
        ), rest
    return pretrained.from_ncsn(tensors), {"sigmas": tensors.get("sigmas")} | rest


@pytest.mark.parametrize("name", ["ncsn_v1", "ncsnv2_original", "ncsnv2"])
def test_networks_of_levels(name):
    model, expected = from_file(name)
    x, labels, sigmas = (jnp.asarray(expected[n]) for n in ("x", "labels", "sigmas"))
    t = jnp.log(sigmas[labels] / sigmas[-1]) / jnp.log(sigmas[0] / sigmas[-1])
    np.testing.assert_allclose(model.sde.sigma(t), sigmas[labels], rtol=1e-4)
    # Each row by itself, since their scales differ by orders of magnitude.
    for score, row in zip(jax.jit(model.score_fn)(x, t), expected["out"], strict=True):
        np.testing.assert_allclose(score, row, atol=1e-4 * np.abs(row).max(), rtol=0)


def test_names_of_data_parallel_training_are_known():
    tensors, _ = reference("ncsn_v1")
    plain, parallel = (pretrained.from_ncsn({p + n: v for n, v in tensors.items()}) for p in ("", "module."))
    jax.tree.map(np.testing.assert_array_equal, plain.params, parallel.params)


def test_the_deepest_network_has_its_stages_in_order():
    """The release numbers its stages 1, 2, 3, 31, 4, 5."""
    network = NCSNv2(2, (1, 2, 2, 2, 4, 4), 5)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros(1))["params"]
    rng = np.random.default_rng(0)
    released = {}
    for path, leaf in traverse_util.flatten_dict(shapes).items():
        block = re.sub(r"(res|refine)(\d+)_?", lambda m: f"{m[1]}{(1, 2, 3, 31, 4, 5)[int(m[2]) - 1]}.", path[0])
        name = ".".join([block, *path[1:]]).replace("kernel", "weight").replace("..", ".")
        value = rng.standard_normal(leaf.shape).astype(np.float32)
        released[name] = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
    model = pretrained.from_ncsn(released | {"sigmas": np.geomspace(50, 0.01, 5)})
    assert model.network == network
    np.testing.assert_array_equal(model.params["params"]["res4_0"]["conv1"]["bias"], released["res31.0.conv1.bias"])


def test_a_wrong_checkpoint_is_named():
    tensors, _ = reference("ncsnv2_original")
    for change, message in (
        ({"end_conv.bias": None}, "no tensor for end_conv/bias, of shape \\(3,\\)"),
        ({"end_conv.bias": np.zeros(4)}, "'end_conv.bias' has shape \\(4,\\) where \\(3,\\) is expected"),
        ({"extra.weight": np.zeros(4)}, "'extra.weight' has no place"),
        ({"begin_conv.weight": None}, "'begin_conv.weight' is missing"),
        ({"sigmas": np.linspace(1, 2, 5)}, "geometrically spaced, decreasing"),
    ):
        changed = {n: v for n, v in (tensors | change).items() if v is not None}
        with pytest.raises(ValueError, match=message):
            pretrained.from_ncsn(changed)
    with pytest.raises(ValueError, match="unknown network 'ncsnv3'"):
        pretrained.from_score_sde({"model": {"name": "ncsnv3"}}, {})
