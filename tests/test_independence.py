"""A sample is a function of its key and its number, not of the batch that it is drawn in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_experiment import tiny, untrained

from score_jax import experiment
from score_jax.errors import UserError

# Of those that run.py can name, the ones that look at a whole batch: step sizes, a path's change, norms, histories.
SAMPLERS = {
    "adaptive_sde": dict(sampler=dict(name="adaptive_sde", rtol=0.5, atol=0.1)),
    "picard": dict(sampler=dict(name="picard", num_points=4, tolerance=0.1)),
    "a corrector": dict(sampler=dict(name="ancestral"), corrector=dict(name="langevin_corrector")),
    "a history": dict(sampler=dict(name="unipc"), grid="curvature"),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(tmp_path, name):
    """Samples 3 to 7 among eight and by themselves, of a network with random parameters."""
    config = tiny("toy2d")
    config.sampling.update(SAMPLERS[name] | dict(num_steps=3))
    run = experiment.Run(config, tmp_path / "run")
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), run.init_state().ema)
    ts, draw = run.grid(params), jax.jit(run.draw)
    eight, five = (draw(params, None, run.key_sample, jnp.arange(first, 8), ts) for first in (0, 3))
    assert np.isfinite(eight).all()
    np.testing.assert_allclose(eight[3:], five, rtol=1e-4, atol=1e-5)


def test_files(tmp_path):
    """The samples of --mode=sample, in batches of 5, 4 and 2."""
    workdir, found = untrained(tiny(), tmp_path / "run"), []
    for size in (5, 4, 2):
        config = tiny()
        config.sampling.batch_size = size
        experiment.run(config, "sample", workdir)
        (file,) = (workdir / "samples").glob("*.npz")
        found.append(np.load(file)["arr_0"].astype(int))
        file.unlink()
    assert np.ptp(found[0], axis=0).max() > 0
    for other in found[1:]:
        assert np.abs(found[0] - other).max() <= 1


def test_norms_of_a_batch_are_refused(tmp_path):
    config = tiny("toy2d")
    config.sampling.corrector = dict(name="langevin_corrector", batch_averaged=True)
    with pytest.raises(UserError, match=r"config\.sampling\.corrector\.batch_averaged: a sample does not depend on"):
        experiment.Run(config, tmp_path / "run")
