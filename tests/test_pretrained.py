"""Published networks: outputs equal those of the published code on its own tensors."""

import json
import pathlib
import pickle
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PUBLISHED, published
from flax import traverse_util

from benchmarks.faults.checkpoints import archive, legacy, tensor, text
from score_jax import pretrained, pytorch, tensors
from score_jax.networks import NCSNpp, NCSNv2, UNet
from score_jax.pretrained import diffusers, score_sde
from score_jax.sde import DDPM

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


def close(out, expected):
    """To 1e-4 of the largest value of each row."""
    assert out.dtype == jnp.float32
    for row, wanted in zip(out, expected, strict=True):
        np.testing.assert_allclose(row, wanted, atol=1e-4 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("name", ["ddpm_vp", "ddpmpp_vp", "ddpmpp_subvp", "ncsnpp_ve"])
def test_networks_of_the_score_sde_family(name):
    model, expected = from_file(name)
    if "score" in expected:  # The output divided by sigma, or as it is.
        close(jax.jit(model.score_fn)(expected["x"], expected["t"]), expected["score"])
    else:
        close(jax.jit(model.network.apply)(model.params, expected["x"], expected["cond"]), expected["out"])


def test_a_discrete_chain_is_told_the_step_and_divided_by_its_noise():
    """Step k of 1,000 is the time (k + 1) / 1,000; its alphas are the product of 1 - beta, betas 1e-4 to 0.02."""
    model, expected = from_file("ddpm_vp")
    x, k = jnp.asarray(expected["x"]), 499
    sigma = np.sqrt(1 - np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: k + 1]))
    out = jax.jit(model.network.apply)(model.params, x, jnp.full(2, float(k)))
    close(jax.jit(model.score_fn)(x, jnp.array((k + 1) / 1000)), -out / sigma)


def test_published_files():
    """Of Flax and of PyTorch: in both the averaged parameters, which differ from those of the optimiser."""
    _, rest = reference("ddpmpp_vp")
    config, io = json.loads(str(rest["config"])), np.load(DATA / "torch_ddpmpp_vp_io.npz")
    for file, expected in (("ddpmpp_vp.checkpoint", rest), ("torch_ddpmpp_vp.pth", io)):
        model = pretrained.load_score_sde(DATA / file, config)
        close(jax.jit(model.network.apply)(model.params, expected["x"], expected["cond"]), expected["out"])


@pytest.mark.parametrize("name", ["ddpm", "defaults", "scale_shift"])
def test_a_network_of_diffusers(name):
    """DDPM's settings; the library's own, of heads, frequencies, paddings; adaptive normalisation."""
    source = DATA / f"diffusers_{name}"
    model, io = pretrained.load_diffusers(source), np.load(source / "io.npz")
    close(jax.jit(model.network.apply)(model.params, io["x"], io["timesteps"].astype(np.float32)), io["out"])


def test_names_of_older_files_of_diffusers(tmp_path):
    shutil.copytree(DATA / "diffusers_ddpm", tmp_path / "unet")
    file, names = tmp_path / "unet" / diffusers.WEIGHTS, {new: old for old, new in diffusers.DEPRECATED.items()}
    whole = tensors.read_safetensors(file)
    tensors.write_safetensors(
        file, {re.sub(r"to_out\.0|to_[qkv]", lambda m: names[m[0]], name): value for name, value in whole.items()}
    )
    assert set(tensors.read_safetensors(file)) != set(whole)
    expected = pretrained.load_diffusers(DATA / "diffusers_ddpm").params
    jax.tree.map(np.testing.assert_array_equal, pretrained.load_diffusers(tmp_path).params, expected)


def torch_file(tree, form=archive):
    """A PyTorch file of dicts and lists of float32 tensors."""
    storages = {}

    def pickled(tree):
        if isinstance(tree, dict):
            return b"}(" + b"".join(text(name) + pickled(value) for name, value in tree.items()) + b"u"
        if isinstance(tree, list):
            return b"](" + b"".join(map(pickled, tree)) + b"e"
        key, x = str(len(storages)), np.ascontiguousarray(tree, np.float32)
        storages[key] = x
        return tensor(x.shape, [step // 4 for step in x.strides], size=x.size, key=key)

    return form(pickled(tree) + b".", storages)


def test_weights_of_diffusers_as_people_have_them(tmp_path):
    """Shards, PyTorch's pickles, variants, names with the prefixes of wrappers, and a file instead of its directory."""
    expected = pretrained.load_diffusers(DATA / "diffusers_ddpm").params
    whole = tensors.read_safetensors(DATA / "diffusers_ddpm" / diffusers.WEIGHTS)
    names, stem = sorted(whole), "diffusion_pytorch_model"
    halves = [{n: whole[n] for n in part} for part in (names[::2], names[1::2])]

    def model(name):
        directory = tmp_path / name
        shutil.copytree(DATA / "diffusers_ddpm", directory)
        (directory / diffusers.WEIGHTS).unlink()
        return directory

    def same(path, atol=0.0):
        params = pretrained.load_diffusers(path).params
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), params, expected)

    def shards(directory, suffix, write):
        files = [f"{stem}-0000{k}-of-00002{suffix}" for k in (1, 2)]
        for file, half in zip(files, halves, strict=True):
            write(directory / file, half)
        places = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        (directory / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

    def write_bin(path, arrays):
        path.write_bytes(torch_file(arrays))

    shards(model("shards"), ".safetensors", tensors.write_safetensors)
    shards(model("shards_bin"), ".bin", write_bin)
    write_bin(model("bin") / f"{stem}.bin", {f"module._orig_mod.{n}": v for n, v in whole.items()})
    half = {n: v.astype(np.float16) for n, v in whole.items()}
    tensors.write_safetensors(model("fp16") / f"{stem}.fp16.safetensors", half)
    for name in ("shards", "shards_bin", "bin"):
        same(tmp_path / name)
    same(tmp_path / "fp16", atol=2e-3)
    same(DATA / "diffusers_ddpm" / diffusers.WEIGHTS)
    tensors.write_safetensors(tmp_path / "fp16" / f"{stem}.non_ema.safetensors", half)
    with pytest.raises(ValueError, match=rf"name the file of the variant .* holds .*{stem}.non_ema.safetensors"):
        pretrained.load_diffusers(tmp_path / "fp16")
    (tmp_path / "bin" / f"{stem}.bin").rename(tmp_path / "bin" / "weights.pt")
    with pytest.raises(ValueError, match=r"there is no diffusion_.*bin holds config.json, io.npz, weights.pt"):
        pretrained.load_diffusers(tmp_path / "bin")


def test_an_index_names_only_files_beside_it(tmp_path):
    shutil.copytree(DATA / "diffusers_ddpm", tmp_path / "a/unet")
    (tmp_path / "a/unet" / diffusers.WEIGHTS).rename(tmp_path / "weights.safetensors")
    for place in ("../../weights.safetensors", str(tmp_path / "weights.safetensors"), "..", "config.json"):
        index = {"weight_map": {"conv_in.bias": place}}
        (tmp_path / "a/unet" / f"{diffusers.WEIGHTS}.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="which is no file of weights beside it"):
            pretrained.load_diffusers(tmp_path / "a")


def test_the_older_format_of_the_score_sde_code(tmp_path):
    """As the small published file, with the names of a network that was compiled and divided over devices."""
    whole = pytorch.read_torch(DATA / "torch_ddpmpp_vp.pth")
    model = {f"module._orig_mod.{name.removeprefix('module.')}": x for name, x in whole["model"].items()}
    tree = {"model": model, "ema": {"shadow_params": whole["ema"]["shadow_params"]}}
    (tmp_path / "old.pth").write_bytes(torch_file(tree, legacy))
    read, expected = (score_sde.read(path) for path in (tmp_path / "old.pth", DATA / "torch_ddpmpp_vp.pth"))
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(read[name], value)


def test_schedules_of_diffusers(tmp_path):
    """By their definitions: betas linear in their roots; squared cosines, but for the last step, which is cut off."""
    file = tmp_path / "scheduler_config.json"
    ends = {"num_train_timesteps": 3, "beta_start": 0.01, "beta_end": 0.09}
    file.write_text(json.dumps({"beta_schedule": "scaled_linear"} | ends))
    np.testing.assert_allclose(diffusers.process_of(tmp_path)[0].betas, [0.01, 0.04, 0.09], rtol=1e-5)
    file.write_text(json.dumps({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 4}))
    sde, k = diffusers.process_of(tmp_path)[0], np.arange(4)
    alpha_bar = np.cos((k / 4 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(sde.alpha(k[1:] / 4) ** 2, alpha_bar[1:] / alpha_bar[0], rtol=1e-4)
    assert sde.betas[3] == np.float32(0.999)


def test_into_diffusers_and_back(tmp_path):
    """Every tensor and setting, and the chain; read by diffusers itself in a test of its own."""
    network = UNet(
        4, (1, 3), 1, (4,), 0.1, "transformer", resample="conv_symmetric", rescale=False, groups=2, epsilon=1e-5
    )
    betas = np.linspace(1e-3, 0.3, 7, dtype=np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    model = pretrained.Pretrained(network, params, DDPM(betas=betas, t_min=1 / 7), lambda x, t: x)
    pretrained.save_diffusers(tmp_path, model, image_size=8)
    again = pretrained.load_diffusers(tmp_path)
    assert again.network == network
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    np.testing.assert_allclose(again.sde.betas, betas, rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("flip", [False, True])
def test_diffusers_itself_computes_the_same(tmp_path, flip):
    """A random network of ours in diffusers, and one with the library's defaults here."""
    torch, library = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    network = UNet(8, (1, 2), 1, (8,), resample="conv", rescale=False, groups=4, head_channels=4)
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 16, 16, 3)))
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(2))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    model = pretrained.Pretrained(network, params, DDPM(), lambda x, t: x)
    pretrained.save_diffusers(tmp_path, model, image_size=16)
    theirs = library.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    if flip:
        theirs = library.UNet2DModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        ).eval()
        theirs.save_pretrained(tmp_path / "unet")
        model = pretrained.load_diffusers(tmp_path)
    with torch.no_grad():
        out = theirs(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor([10, 900])).sample.permute(0, 2, 3, 1).numpy()
    close(jax.jit(model.network.apply)(model.params, x, jnp.array([10.0, 900.0])), out)


COUNTS = {
    "ve/cifar10_ncsnpp_continuous": 62_758_915,
    "ve/cifar10_ncsnpp_deep_continuous": 107_587_075,
    "ve/cifar10_ncsnpp": 62_693_251,
    "vp/cifar10_ncsnpp_continuous": 62_693_251,
    "vp/cifar10_ddpmpp_continuous": 61_804_419,
    "vp/cifar10_ddpmpp_deep_continuous": 106_632_579,
    "vp/ddpm/cifar10": 35_218_947,
    "ve/celebahq_256_ncsnpp_continuous": 65_574_549,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name):
    config = published(name)
    network, size = score_sde.network_of(config), config["data"]["image_size"]
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, size, size, 3)), jnp.zeros(1))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == COUNTS[name]


def test_all_published_settings_are_known():
    for name, fields in PUBLISHED.items():
        if fields.get("model.name") in ("ncsnpp", "ddpm"):
            assert isinstance(score_sde.network_of(published(name)), NCSNpp)
            score_sde.process_of(published(name))


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


def test_a_wrong_file_is_named(tmp_path):
    """Truncated, of something else, with a tensor missing or of another shape; what is pickled is not run."""
    _, rest = reference("ddpmpp_vp")
    config = json.loads(str(rest["config"]))
    flax_file, torch_file = (DATA / n for n in ("ddpmpp_vp.checkpoint", "torch_ddpmpp_vp.pth"))
    path, trap = tmp_path / "file", tmp_path / "trap"

    class Malicious:
        def __reduce__(self):
            return pathlib.Path.touch, (trap,)

    whole_flax, whole_torch = flax_file.read_bytes(), torch_file.read_bytes()
    for content in (whole_flax[:-50_000], whole_torch[:-50_000], pickle.dumps(Malicious()), b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)) as error:
            pretrained.load_score_sde(path, config)
        assert "\n" not in str(error.value)
    assert not trap.exists()

    shutil.copytree(DATA / "diffusers_ddpm", tmp_path / "unet")
    file = tmp_path / "unet" / diffusers.WEIGHTS
    whole = tensors.read_safetensors(file)
    for change, message in (
        ({"conv_out.bias": None}, "no tensor for Conv_1/bias, of shape \\(3,\\)"),
        ({"conv_out.bias": np.zeros(4, np.float32)}, "'conv_out.bias' has shape \\(4,\\) where \\(3,\\) is"),
        ({"more.bias": np.zeros(4, np.float32)}, "'more.bias' has no place"),
    ):
        tensors.write_safetensors(file, {n: v for n, v in (whole | change).items() if v is not None})
        with pytest.raises(ValueError, match=message):
            pretrained.load_diffusers(tmp_path)
    file = tmp_path / "unet/config.json"
    settings = json.loads(file.read_text())
    for change, message in (
        ({"act_fn": "gelu"}, "act_fn: only 'silu' is known, got 'gelu'"),
        ({"sample_size": None}, "sample_size must be int from 1 to 2048, got None"),
        ({"attn_norm_num_groups": 2}, "attn_norm_num_groups: only norm_num_groups, 8, is known, got 2"),
        (
            {"resnet_time_scale_shift": "scale_shift"},
            "attn_norm_num_groups: only norm_num_groups, 8, is known, got None",
        ),
    ):
        file.write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=message):
            pretrained.load_diffusers(tmp_path)
    file.write_text(json.dumps(settings))
    (tmp_path / "scheduler").mkdir()
    tensors.write_safetensors(tmp_path / "unet" / diffusers.WEIGHTS, whole)
    rescaled = {"beta_schedule": "linear", "rescale_betas_zero_snr": True}
    for scheduler in ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, rescaled):
        (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
        with pytest.raises(ValueError, match="not DDPM's chain of betas"):
            pretrained.load_diffusers(tmp_path)
    config["model"]["resblock_type"] = "resnet"
    with pytest.raises(ValueError, match="resblock_type: unknown 'resnet'; there are biggan, ddpm"):
        pretrained.load_score_sde(torch_file, config)
    with pytest.raises(ValueError, match="config lacks the published field 'model'"):
        pretrained.load_score_sde(torch_file, {})
