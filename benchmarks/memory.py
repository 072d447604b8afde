"""Peak memory of DDPM++'s training step at batch 8, as XLA counts it.

As a multiple of parameters, their average, Adam's two moments and the gradient, five times the parameters; with
`remat` and without.  On CPU `remat` works by a flag of `train.tune_cpu`.
"""

import jax
import jax.numpy as jnp

from benchmarks import subjects


def multiple(*, remat: bool) -> dict[str, float]:
    it = subjects.subject("vp_cifar", subjects.CIFAR, remat=remat)
    batch = {"x": jnp.zeros(it.shape), "y": jnp.zeros(it.shape[0], jnp.int32)}
    sizes = it.step.lower(it.state, jax.random.key(0), batch).compile().memory_analysis()
    # The new state takes the place of the old one.
    peak = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    peak -= sizes.alias_size_in_bytes
    five = 5 * sum(p.nbytes for p in jax.tree.leaves(it.state.params))
    return {"GiB": peak / 2**30, "multiple": peak / five}
