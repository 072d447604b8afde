"""Networks: Linen modules called as `network.apply(params, x, cond, y=None, *, train=False)`."""

from score_jax.networks.classifier import Classifier
from score_jax.networks.dit import DiT
from score_jax.networks.mlp import MLP
from score_jax.networks.ncsn import NCSN, NCSNv2
from score_jax.networks.ncsnpp import NCSNpp
from score_jax.networks.unet import UNet

__all__ = ["MLP", "NCSN", "Classifier", "DiT", "NCSNpp", "NCSNv2", "UNet"]
