"""Networks: shapes, independence of rows, conditioning, and layers against their definitions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from scipy.signal import upfirdn

from score_jax.networks import MLP, NCSN, Classifier, DiT, NCSNpp, NCSNv2, UNet, embeddings, layers, ncsn


def randomised(network, x, *args):
    """Parameters with every tensor random: a fresh network's zero output would hide everything."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, *args)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)


CASES = {
    "unet": (UNet(4, (1, 2), 1, (2,), 0.0, "positional", 3), (4, 4, 4, 2)),
    "adm": (
        UNet(8, (1, 2), 1, (2,), num_classes=3, resample="block", rescale=False, adaptive=True, head_channels=4),
        (4, 4, 4, 2),
    ),
    "ncsnpp": (
        NCSNpp(
            *(4, (1, 2), 1, (2,), 0.0, "gaussian_fourier", 3),
            resample="conv",
            taps=(1, 3, 3, 1),
            progressive="residual",
            progressive_input="input_skip",
            combine="cat",
        ),
        (4, 4, 4, 2),
    ),
    "ncsnpp, sum of outputs": (
        NCSNpp(4, (1, 2), 1, num_classes=3, progressive="output_skip", progressive_input="residual"),
        (4, 4, 4, 2),
    ),
    "dit": (DiT(16, 2, 2, num_classes=3), (4, 4, 4, 2)),
    "mlp": (MLP(16, 2, "fourier", 3), (4, 5)),
}


@pytest.fixture(params=CASES)
def case(request):
    network, shape = CASES[request.param]
    x = jax.random.normal(jax.random.key(2), shape)
    cond, y = jnp.array([1.0, 200.0, 500.0, 999.0]), jnp.array([0, 1, 2, 0])
    params = randomised(network, x, cond, y)
    return jax.jit(network.apply), params, x, cond, y


def test_output_depends_on_every_input_row_by_row(case):
    apply, params, x, cond, y = case
    out = apply(params, x, cond, y)
    assert out.shape == x.shape == jax.eval_shape(apply, params, x, 3.0, y).shape
    assert out.dtype == jnp.float32
    for changed in (
        apply(params, x.at[0].mul(2.0), cond, y),
        apply(params, x, cond.at[0].mul(2.0), y),
        apply(params, x, cond, y.at[0].set(1)),
    ):
        assert float(jnp.abs(changed[0] - out[0]).max()) > 1e-3
        np.testing.assert_allclose(changed[1:], out[1:], rtol=1e-4, atol=1e-5)


SMALL = {
    "adm": UNet(8, (1,), 1, (4,), num_classes=3, rescale=False, adaptive=True, head_channels=4),
    "ncsnpp": NCSNpp(8, (1,), 1, (4,), num_classes=3, scale_by_sigma=True),
    "dit": DiT(16, 2, 2, num_classes=3),
}


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_and_rematerialisation(name):
    """In bfloat16 within 2 %; computed again for the gradient, the same to rounding; one tree of parameters."""
    network, x = SMALL[name], jax.random.normal(jax.random.key(0), (4, 4, 4, 2))
    cond, y = jnp.array([1.0, 20.0, 500.0, 999.0]), jnp.arange(4) % 3
    params = randomised(network, x, cond, y)

    def value(network):
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(x * network.apply(p, x, cond, y))))(params)

    (plain, gradient), (again, recomputed) = value(network), value(network.clone(remat=True))
    np.testing.assert_allclose(plain, again, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(a).max()) + 1e-6, rtol=0)
    half = jax.jit(network.clone(dtype="bfloat16").apply)(params, x, cond, y)
    full = jax.jit(network.apply)(params, x, cond, y)
    assert half.dtype == jnp.float32
    # All within, but for what the network knows, is in half precision: nothing widens it on the way.
    seen = jax.eval_shape(lambda: network.clone(dtype="bfloat16").apply(params, x, cond, y, capture_intermediates=True))
    outputs = traverse_util.flatten_dict(seen[1]["intermediates"])
    wide = {path[0] for path, (output,) in outputs.items() if output.dtype != jnp.bfloat16}
    assert wide <= {"__call__", "Embedding_0"}
    assert 1e-4 < float(jnp.linalg.norm(half - full) / jnp.linalg.norm(full)) < 0.02


def test_no_class_is_a_class_of_its_own(case):
    """The label `num_classes`: finite, and unlike each of the three classes."""
    apply, params, x, cond, _ = case
    outs = [np.asarray(apply(params, x, cond, jnp.full(4, label))) for label in range(4)]
    assert np.isfinite(outs[3]).all()
    assert all(np.abs(outs[3] - out).max() > 1e-3 for out in outs[:3])


def test_class_and_time_are_added_before_the_last_activation():
    """silu(W_2 silu(W_1 waves) + class), by hand: behind it, what a class changes would be the same at all times."""
    network, cond, y = embeddings.Embedding(4, num_classes=2), jnp.array([3.0, 700.0]), jnp.array([1, 2])
    params = randomised(network, cond, y)
    (first, second), table = (params["params"][f"Dense_{i}"] for i in range(2)), params["params"]["Embed_0"]
    h = nn.silu(embeddings.positional(cond, 4) @ first["kernel"] + first["bias"][None])
    expected = nn.silu(h @ second["kernel"] + second["bias"][None] + table["embedding"][y])
    np.testing.assert_allclose(network.apply(params, cond, y), expected, rtol=1e-5, atol=1e-6)


def test_labels_for_a_network_without_classes_are_an_error():
    with pytest.raises(ValueError, match="set num_classes"):
        embeddings.Embedding(4).init(jax.random.key(0), jnp.ones(2), jnp.ones(2, jnp.int32))
    with pytest.raises(ValueError, match="set num_augmentations"):
        embeddings.Embedding(4).init(jax.random.key(0), jnp.ones(2), None, jnp.ones((2, 3)))


def test_classifier_logits_depend_on_image_and_noise_level_row_by_row():
    network, x = Classifier(4, (1, 2), 1, (2,), num_classes=5), jax.random.normal(jax.random.key(0), (4, 4, 4, 2))
    cond = jnp.array([1.0, 200.0, 500.0, 999.0])
    params, apply = randomised(network, x, cond), jax.jit(network.apply)
    out = apply(params, x, cond)
    assert out.shape == (4, 5)
    for changed in (apply(params, x.at[0].mul(2.0), cond), apply(params, x, cond.at[0].mul(2.0))):
        assert float(jnp.abs(changed[0] - out[0]).max()) > 1e-3
        np.testing.assert_allclose(changed[1:], out[1:], rtol=1e-4, atol=1e-5)


PUBLISHED_COUNTS = {
    "NCSN, CIFAR-10": (NCSN(), (32, 32, 3), 30_117_635),
    "NCSN, MNIST": (NCSN(64), (28, 28, 1), 7_638_657),
    "NCSNv2": (NCSNv2(), (32, 32, 3), 29_694_083),
    "NCSNv2 of the score-SDE code": (NCSNv2(score_sde=True), (32, 32, 3), 33_970_563),
    "NCSNv2 Deeper": (NCSNv2(multipliers=(1, 2, 2, 4, 4)), (128, 128, 3), 83_445_379),
    "NCSNv2 Deepest": (NCSNv2(multipliers=(1, 2, 2, 2, 4, 4)), (256, 256, 3), 94_132_611),
}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_published_parameter_counts(name):
    network, shape, count = PUBLISHED_COUNTS[name]
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros(1))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_ncsnv2_scales_one_function_by_the_noise_level():
    network = NCSNv2(2, num_levels=3, sigma_min=0.1, sigma_max=10.0)
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 4, 4, 1)), (3, 4, 4, 1))
    out = jax.jit(network.apply)(randomised(network, x, jnp.zeros(3)), x, jnp.array([0, 1, 2]))
    np.testing.assert_allclose(out, out[1:2] * np.array([0.1, 1.0, 10.0])[:, None, None, None], rtol=1e-5)


def test_instance_norm_plus_equals_its_definition():
    """Instance normalisation by PyTorch's formula, plus what it forgets, the channels' own means."""
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 4, 4, 6))
    norm = ncsn.InstanceNormPlus(num_levels=5)
    level = jnp.array([1, 4])
    params = randomised(norm, x, level)
    gamma, alpha, beta = np.split(params["params"]["embed"]["embedding"][level][:, None, None, :], 3, axis=-1)
    mean = np.mean(x, axis=(1, 2), keepdims=True)
    inside = (x - mean) / np.std(x, axis=(1, 2), keepdims=True)
    across = (mean - mean.mean(axis=3, keepdims=True)) / mean.std(axis=3, keepdims=True, ddof=1)
    np.testing.assert_allclose(norm.apply(params, x, level), gamma * (inside + alpha * across) + beta, atol=1e-4)


def test_a_fresh_network_predicts_zero():
    network, args = UNet(4, (1,), 1, ()), (jnp.ones((2, 4, 4, 1)), jnp.ones(2))
    out = jax.jit(lambda key: network.apply(network.init(key, *args), *args))(jax.random.key(0))
    assert (out == 0).all()


def test_dropout_is_active_in_training_only():
    network = UNet(4, (1,), 1, (), 0.5)
    x, cond = jax.random.normal(jax.random.key(0), (2, 4, 4, 1)), jnp.ones(2)
    params = randomised(network, x, cond)

    @jax.jit
    def out(key):
        return network.apply(params, x, cond, train=True, rngs={"dropout": key}), network.apply(params, x, cond)

    (first, plain), (second, again) = out(jax.random.key(0)), out(jax.random.key(1))
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(plain, again)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_draws_each_element_by_itself(rate):
    """The share that is kept, and correlations with neighbours and with the mask of another key.

    262,144 elements; 11 figures a rate, each within 4 standard errors: false alarm 2e-3 for all (fixed keys).
    """
    x = jax.random.uniform(jax.random.key(0), (16, 16, 16, 64), minval=1.0, maxval=2.0)
    drop = jax.vmap(lambda key: jax.value_and_grad(lambda x: layers.dropout(x, key, rate).sum())(x))
    keys = jax.random.wrap_key_data(jnp.array([[5, 7], [6, 7], [5, 8]], jnp.uint32))
    totals, masks = jax.jit(drop)(keys)
    kept = np.asarray(masks) > 0
    np.testing.assert_allclose(masks[kept], 1 / (1 - rate), rtol=1e-6)
    np.testing.assert_allclose(totals, (x[None] * masks).sum((1, 2, 3, 4)), rtol=1e-4)
    scores = (kept - (1 - rate)) / np.sqrt(rate * (1 - rate))
    figures = [score.mean() for score in scores]
    figures += [(scores[0] * np.roll(scores[0], 1, axis)).mean() for axis in range(4)]
    figures += [(scores[0] * np.roll(scores[0], 2**i, 3)).mean() for i in (1, 5)]
    figures += [(scores[0] * other).mean() for other in scores[1:]]
    assert np.abs(figures).max() < 4 / np.sqrt(x.size)


def test_rates_of_dropout_that_are_none():
    with pytest.raises(ValueError, match="rate must be at least 0 and less than 1, got 1"):
        layers.dropout(jnp.ones(3), jax.random.key(0), 1.0)


def test_augmentation_labels_are_known_and_none_is_zeros():
    network = UNet(4, (1,), 1, (), num_augmentations=2)
    x, cond = jax.random.normal(jax.random.key(0), (2, 4, 4, 1)), jnp.ones(2)
    params, apply = randomised(network, x, cond), jax.jit(network.apply)
    none, zeros, ones = (apply(params, x, cond, None, a) for a in (None, jnp.zeros((2, 2)), jnp.ones((2, 2))))
    np.testing.assert_array_equal(none, zeros)
    assert float(jnp.abs(ones - none).max()) > 1e-3


def test_filters_equal_their_definition():
    """Zeros between pixels, convolution, every second pixel, by an independent implementation."""
    x, taps = np.asarray(jax.random.normal(jax.random.key(0), (2, 6, 4, 3))), np.array([1.0, 3.0, 4.0, 2.0])
    for up in (True, False):
        out = x
        for axis, size in ((1, 6), (2, 4)):
            if up:
                wide = upfirdn(2 * taps / 10, out, up=2, axis=axis)
                out = np.take(wide, np.arange(1, 1 + 2 * size), axis=axis)
            else:
                out = np.take(upfirdn(taps / 10, out, axis=axis), np.arange(2, 2 + size, 2), axis=axis)
        np.testing.assert_allclose(layers.resample(jnp.asarray(x), up=up, taps=tuple(taps)), out, atol=1e-5)


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("taps", [(), (1, 3, 3, 1)])
def test_a_convolution_that_changes_nothing_leaves_a_change_of_resolution(up, taps):
    """Of a filter; without one half is every second pixel, of which there is no filter to see."""
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    module = layers.Resample(up, 3, taps)
    kernel = jnp.zeros((3, 3, 3, 3)).at[1, 1].set(jnp.eye(3))
    out = module.apply({"params": {"Conv_0": {"kernel": kernel, "bias": jnp.zeros(3)}}}, x)
    expected = layers.resample(x, up=up, taps=taps) if up or taps else x[:, 1::2, 1::2]
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_attention_of_heads_is_attention_of_each():
    x = jax.random.normal(jax.random.key(0), (1, 2, 3, 8))
    params = randomised(layers.Attention(2), x)
    p = params["params"]
    h = layers.GroupNorm().apply({"params": p["GroupNorm_0"]}, x).reshape(6, 8)
    q, k, v = (h @ p[f"Dense_{i}"]["kernel"] + p[f"Dense_{i}"]["bias"][None] for i in range(3))
    heads = [jax.nn.softmax(q[:, s] @ k[:, s].T / 2, axis=1) @ v[:, s] for s in (slice(4), slice(4, 8))]
    out = jnp.concatenate(heads, axis=1) @ p["Dense_3"]["kernel"] + p["Dense_3"]["bias"][None]
    joined = layers.Attention(2, rescale=False).apply(params, x).reshape(6, 8)
    np.testing.assert_allclose(joined, x.reshape(6, 8) + out, rtol=1e-4, atol=1e-5)


def test_group_norm_equals_its_definition():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 4, 4, 24))
    params = randomised(layers.GroupNorm(), x)
    reference = nn.GroupNorm(num_groups=6, epsilon=1e-6)
    expected = reference.apply(params, x)
    np.testing.assert_allclose(layers.GroupNorm().apply(params, x), expected, rtol=1e-4, atol=1e-4)
    # Its derivatives, too, in either direction.
    direction = jax.random.normal(jax.random.key(1), x.shape)
    products, gradients = [], []
    for network in (layers.GroupNorm(), reference):
        products.append(jax.jvp(lambda x, n=network: n.apply(params, x), (x,), (direction,))[1])
        gradients.append(jax.vjp(network.apply, params, x)[1](direction))
    np.testing.assert_allclose(*products, rtol=1e-3, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *gradients)


def test_attention_equals_its_definition():
    """Softmax of scaled products over all pixels, as a loop."""
    x = jax.random.normal(jax.random.key(0), (1, 2, 3, 8))
    params = randomised(layers.Attention(), x)
    p = params["params"]
    h = layers.GroupNorm().apply({"params": p["GroupNorm_0"]}, x).reshape(6, 8)
    dense = [h @ p[f"Dense_{i}"]["kernel"] + p[f"Dense_{i}"]["bias"][None] for i in range(3)]
    mixed = jax.nn.softmax(dense[0] @ dense[1].T / np.sqrt(8), axis=1) @ dense[2]
    out = mixed @ p["Dense_3"]["kernel"] + p["Dense_3"]["bias"][None]
    expected = (x.reshape(6, 8) + out) / np.sqrt(2)
    np.testing.assert_allclose(layers.Attention().apply(params, x).reshape(6, 8), expected, rtol=1e-4, atol=1e-5)


def test_embeddings_tell_conditioning_values_apart():
    for wave, values in (
        (embeddings.positional, jnp.arange(0.0, 1000.0, 10.0)),
        (embeddings.fourier, jnp.geomspace(0.01, 50, 100)),
    ):
        e = np.asarray(wave(values, 32))
        distance = np.linalg.norm(e[:, None] - e[None], axis=-1) + 10 * np.eye(100)
        assert e.shape == (100, 32)
        assert distance.min() > 0.05


def test_upsample_repeats_pixels():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(layers.resample(x, up=True), np.repeat(np.repeat(x, 2, axis=1), 2, axis=2))


def test_bad_input():
    with pytest.raises(ValueError, match="divisible by 4"):
        UNet(8, (1, 1, 1), 1).init(jax.random.key(0), jnp.ones((1, 10, 10, 1)), jnp.ones(1))
    with pytest.raises(ValueError, match="divisible by 2"):
        NCSN(8).init(jax.random.key(0), jnp.ones((1, 9, 8, 1)), jnp.ones(1))
    with pytest.raises(ValueError, match="at least 3"):
        NCSNv2(8, (1, 2)).init(jax.random.key(0), jnp.ones((1, 8, 8, 1)), jnp.ones(1))
    with pytest.raises(ValueError, match="needs labels"):
        MLP(8, num_classes=3).init(jax.random.key(0), jnp.ones((1, 2)), jnp.ones(1))
    with pytest.raises(ValueError, match="divisible by patch=2"):
        DiT(16, 1, 2).init(jax.random.key(0), jnp.ones((1, 5, 4, 1)), jnp.ones(1))
    with pytest.raises(ValueError, match="unknown progressive 'skip'; there are none, output_skip, residual"):
        NCSNpp(8, (1,), progressive="skip").init(jax.random.key(0), jnp.ones((1, 4, 4, 1)), jnp.ones(1))
    with pytest.raises(ValueError, match="unknown dtype 'bfloat17'; there are float32, bfloat16, float16"):
        UNet(8, (1,), 1, dtype="bfloat17").init(jax.random.key(0), jnp.ones((1, 4, 4, 1)), jnp.ones(1))
    with pytest.raises(ValueError, match="9 channels do not divide into 2 heads"):
        layers.Attention(2).init(jax.random.key(0), jnp.ones((1, 4, 4, 9)))
    with pytest.raises(ValueError, match="unknown resample 'max'"):
        UNet(8, (1, 1), 1, resample="max").init(jax.random.key(0), jnp.ones((1, 4, 4, 1)), jnp.ones(1))
    with pytest.raises(ValueError, match="unknown embedding"):
        MLP(8, embedding="fourer").init(jax.random.key(0), jnp.ones((1, 2)), jnp.ones(1))
