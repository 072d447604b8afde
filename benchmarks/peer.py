"""The same networks in torch, from our parameters: the peer in speed.

`TorchUNet` is `UNet` and `NCSNpp` as `configs/vp_digits.py` and `configs/vp_cifar.py` have them, without dropout:
no filters, no pyramids, one head, residual sums divided by sqrt(2).
"""

import collections
import math

import jax
import numpy as np
import torch
import torch.nn.functional as F

from score_jax.networks import NCSNpp


class TorchUNet:
    """`network(x, cond)` on images `[batch, channels, height, width]`.

    Attributes:
      leaves: the parameters, which take gradients.
    """

    def __init__(self, network, params):
        def tensor(p):
            p = np.array(p)
            return torch.from_numpy(p.transpose(3, 2, 0, 1).copy() if p.ndim == 4 else p).requires_grad_()

        self.network, self.params = network, jax.tree.map(tensor, params["params"])
        self.leaves = jax.tree.leaves(self.params)

    def __call__(self, x, cond):
        net, counts = self.network, collections.Counter()
        published = isinstance(net, NCSNpp)

        def take(kind):
            counts[kind] += 1
            return self.params[f"{kind}_{counts[kind] - 1}"]

        def step(h, attend, change=None):
            h = residual_block(take("ResidualBlock"), h, emb, change)
            return attention(take("Attention"), h) if attend else h

        def change(h, fn):
            return step(h, False, fn) if net.resample == "block" else fn(h)

        emb = embedding(take("Embedding"), cond, net.features)
        skips = [conv(take("Conv"), x)]
        for level in range(len(net.multipliers)):
            if level:
                skips.append(change(skips[-1], lambda h: F.avg_pool2d(h, 2)))
            for _ in range(net.num_blocks):
                skips.append(step(skips[-1], skips[-1].shape[2] in net.attention_at))
        h = step(step(skips[-1], True), False)
        for level in reversed(range(len(net.multipliers))):
            for i in range(net.num_blocks + 1):
                attend = h.shape[2] in net.attention_at and (i == net.num_blocks or not published)
                h = step(torch.cat([h, skips.pop()], 1), attend)
            if level:
                h = change(h, lambda h: F.interpolate(h, scale_factor=2.0))
        return conv(take("Conv"), F.silu(group_norm(take("GroupNorm"), h)))


def conv(p, x):
    return F.conv2d(x, p["kernel"], p["bias"], padding=1)


def dense(p, x):
    return F.linear(x, p["kernel"].T, p["bias"])


def group_norm(p, x):
    groups = math.gcd(x.shape[1], min(max(x.shape[1] // 4, 1), 32))
    return F.group_norm(x, groups, p["scale"], p["bias"], 1e-6)


def embedding(p, cond, size):
    frequencies = torch.exp(-math.log(10_000) * torch.arange(size // 2) / (size // 2 - 1))
    angles = cond[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    return F.silu(dense(p["Dense_1"], F.silu(dense(p["Dense_0"], waves))))


def residual_block(p, x, emb, change):
    h = F.silu(group_norm(p["GroupNorm_0"], x))
    if change:
        h, x = change(h), change(x)
    h = conv(p["Conv_0"], h) + dense(p["Dense_0"], emb)[:, :, None, None]
    h = conv(p["Conv_1"], F.silu(group_norm(p["GroupNorm_1"], h)))
    if "Dense_1" in p:
        x = F.conv2d(x, p["Dense_1"]["kernel"].T[:, :, None, None], p["Dense_1"]["bias"])
    return (x + h) / math.sqrt(2)


def attention(p, x):
    h = group_norm(p["GroupNorm_0"], x).flatten(2).transpose(1, 2)
    h = F.scaled_dot_product_attention(*(dense(p[f"Dense_{i}"], h) for i in range(3)))
    return (x + dense(p["Dense_3"], h).transpose(1, 2).reshape(x.shape)) / math.sqrt(2)


def runs(network, params, x, cond, output):
    """The forward pass and the gradient of the mean squared output in torch, if the output is ours."""
    peer = TorchUNet(network, params)
    x, cond = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(np.array(cond))

    def forward():
        with torch.no_grad():
            return peer(x, cond)

    def gradient():
        return torch.autograd.grad(peer(x, cond).square().mean(), peer.leaves)

    np.testing.assert_allclose(forward().permute(0, 2, 3, 1), output, atol=1e-3 * np.abs(output).max())
    # Not arrays of JAX, which waits for those only; torch has finished when it returns.
    return {"torch forward": lambda: forward() is None, "torch gradient": lambda: gradient() is None}
