"""Where arrays lie on many devices and processes: one mesh, and one rule for each kind of array.

The mesh has three axes.  A batch is divided over `data` and `fsdp`; parameters, their average and the optimizer's state
over `fsdp`, each array along its largest axis that divides, small ones not at all (Rajbhandari et al. 2020, "ZeRO",
stage 3); and, where a network says how (`tensor_axes`), over `tensor` (Shoeybi et al. 2019, "Megatron-LM").  Everything
else is global-view `jit`: the compiler places what follows, and the same program runs on one device or a thousand.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from score_jax.errors import UserError

__all__ = [
    "local_rows",
    "make_mesh",
    "num_shards",
    "of_batch",
    "of_state",
    "put",
    "put_local",
    "replicated",
    "to_host",
]

AXES = ("data", "fsdp", "tensor")
SMALL = 1024  # Elements of an array that is not worth dividing.


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """All devices, or as many as asked for, as a mesh.

    Args:
      data: over how many to divide batches alone; -1 is all that the others leave, and so for them.
      fsdp: over how many to divide batches and parameters.
      tensor: over how many to divide the features of layers.

    Raises:
      UserError: if there are not so many devices.
    """
    sizes, count = {"data": data, "fsdp": fsdp, "tensor": tensor}, jax.device_count()
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    unknown = [name for name, size in sizes.items() if size == -1]
    told = [size for size in sizes.values() if size != -1]
    known = math.prod(told)
    if len(unknown) > 1 or min(told) < 1 or (unknown and count % known):
        raise UserError(f"config.mesh: {asked} does not divide {count} devices; one of them may be -1, for the rest")
    for name in unknown:
        sizes[name] = count // known
    total = math.prod(sizes.values())
    # Fewer than there are is for one process: others would have none.
    if total > count or (total < count and jax.process_count() > 1):
        raise UserError(f"config.mesh: {asked} asks for {total} devices, and there are {count}")
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:total]
    )


def of_batch(mesh: Mesh) -> NamedSharding:
    """Examples, the first axis of an array, over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def of_state(mesh: Mesh, tree: Any, tensor_axes: Mapping[str, int] | None = None) -> Any:
    """Where parameters, or anything with a tree of them inside, lie: a sharding for each array.

    Args:
      mesh: from `make_mesh`.
      tree: of arrays or `jax.ShapeDtypeStruct`.
      tensor_axes: the axis to divide over `tensor` by the path that an array's name ends in, a regular expression.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        spec: list[str | None] = [None] * leaf.ndim
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, axis in (tensor_axes or {}).items():
            if re.search(f"{pattern}$", name) and leaf.shape[axis] % mesh.shape["tensor"] == 0:
                spec[axis] = "tensor"
        divisible = [i for i, n in enumerate(leaf.shape) if spec[i] is None and n % mesh.shape["fsdp"] == 0]
        if leaf.size >= SMALL and divisible:
            spec[max(divisible, key=lambda i: (leaf.shape[i], i))] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def num_shards(mesh: Mesh | None) -> int:
    """Into how many parts a batch is divided; without a mesh it is one."""
    return mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1


def local_rows(mesh: Mesh, n: int) -> np.ndarray:
    """The rows of a batch of n that the devices of this process hold, in order."""
    parts = of_batch(mesh).addressable_devices_indices_map((n,)).values()
    return np.unique(np.concatenate([np.arange(n)[part] for part in parts]))


def put_local(mesh: Mesh, batch: Any, n: int) -> Any:
    """A batch of n, of which every process has the rows of `local_rows`: a pytree of host arrays to global ones."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(of_batch(mesh), x, (n, *x.shape[1:])), batch)


def put(mesh: Mesh | None, batch: Any) -> Any:
    """A batch that every process has whole, a pytree of host arrays, to global arrays; without a mesh to one device."""
    return jax.device_put(batch, of_batch(mesh) if mesh else None)


def to_host(x: Array) -> np.ndarray:
    """The whole array on the host of every process."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
