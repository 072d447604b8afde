"""What all families share: the result, and how tensors find their places."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import Array

from score_jax.parameterization import from_score
from score_jax.sde import SDE, ScoreFn
from score_jax.tensors import short

__all__ = ["Pretrained", "fill", "images", "named", "with_score"]

# The largest published networks have a thousand tensors, with names of a hundred characters.
MOST_TENSORS = 100_000
LONGEST_NAME = 500


class Pretrained(NamedTuple):
    """A trained network.

    Attributes:
      network: the Linen module.
      params: its parameters, what `network.apply` takes.
      sde: the process that it was trained on.
      score_fn: `score_fn(x, t)`, the score of the marginals of `sde`.
    """

    network: nn.Module
    params: Any
    sde: SDE
    score_fn: ScoreFn


def with_score(
    network: nn.Module,
    params: Any,
    sde: SDE,
    condition: Callable[[Array], Array],
    adapter: Callable[..., ScoreFn] = from_score,
) -> Pretrained:
    """A network with its score, `condition(t)` being what it is told and `adapter` what it predicts."""

    def net(x: Array, t: Array) -> Array:
        return cast(Array, network.apply(params, x, condition(t)))

    return Pretrained(network, params, sde, adapter(sde, net))


def images(*shape: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """An image `[h, w, c]` and its conditioning value."""
    return jax.ShapeDtypeStruct((1, *shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)


def named(tree: Any) -> dict[str, np.ndarray]:
    """Tensors by their names, without what wrappers of PyTorch put before those: `module.`, `_orig_mod.`.

    Raises:
      ValueError: if these are no arrays of real numbers by names, or two become one, naming it.
    """
    if not isinstance(tree, Mapping) or len(tree) > MOST_TENSORS:
        what = f"{len(tree)} entries" if isinstance(tree, Mapping) else f"a {type(tree).__name__}"
        raise ValueError(f"there are no tensors by their names, but {what}")
    tensors: dict[str, np.ndarray] = {}
    for full, value in tree.items():
        if type(full) is not str or len(full) > LONGEST_NAME:
            raise ValueError(f"a tensor has the name {short(full)}")
        if not hasattr(value, "__array__"):
            raise ValueError(f"{short(full)} is no tensor, but a {type(value).__name__}")
        name, array = re.sub(r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\.", "", full), np.asarray(value)
        if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
            raise ValueError(f"the tensor {full!r} has the dtype {array.dtype}")
        if name in tensors:
            raise ValueError(f"two tensors have the name {name!r}, but for what wrappers put before it")
        tensors[name] = array
    return tensors


def fill(
    network: nn.Module, inputs: tuple[Any, ...], tensors: Mapping[str, np.ndarray], ours: Callable[[str], str]
) -> Any:
    """The parameters of a network from tensors by their published names.

    Args:
      network: the Linen module.
      inputs: what it is called with, as in `images`.
      tensors: by name, their axes in our order.
      ours: translates a name.  In names separators do not matter, in shapes axes of length one.

    Raises:
      ValueError: if a tensor is missing, left over or of the wrong shape, naming it.
    """

    def key(name: str) -> str:
        return re.sub(r"\W", "_", name)

    template = traverse_util.flatten_dict(jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"])
    published: dict[str, str] = {}
    for name in tensors:
        other = published.setdefault(key(ours(name)), name)
        if other != name:
            raise ValueError(f"the tensors {other!r} and {name!r} have one place in the network")
    params = {}
    for path, leaf in template.items():
        found = published.pop(key("/".join(path)), None)
        if found is None:
            raise ValueError(f"the checkpoint has no tensor for {'/'.join(path)}, of shape {leaf.shape}")
        value = tensors[found]
        if np.squeeze(value).shape != tuple(n for n in leaf.shape if n > 1):
            raise ValueError(f"the tensor {found!r} has shape {value.shape} where {leaf.shape} is expected")
        params[path] = jnp.asarray(value, leaf.dtype).reshape(leaf.shape)
    if published:
        raise ValueError(f"the checkpoint's tensor {min(published.values())!r} has no place in the network")
    return {"params": traverse_util.unflatten_dict(params)}
