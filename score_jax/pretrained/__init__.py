"""Published checkpoints: from their tensors to a network of ours, its process and its score.

One function a family takes the tensors under the names that the family gave them and returns a `Pretrained`.  What
a checkpoint does not hold, its settings, is read off the shapes where they tell and is an argument where they do not.
A tensor that is missing, left over or of the wrong shape is a `ValueError` that names it.
"""

from score_jax.pretrained.base import Pretrained
from score_jax.pretrained.diffusers import load_diffusers, save_diffusers
from score_jax.pretrained.ncsn import from_ncsn
from score_jax.pretrained.score_sde import from_score_sde, load_score_sde

__all__ = ["Pretrained", "from_ncsn", "from_score_sde", "load_diffusers", "load_score_sde", "save_diffusers"]
