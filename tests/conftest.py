"""What tests share: strict array semantics, processes, and one mixture with everything that can go wrong."""

import json
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import multivariate_normal

import score_jax as sj

# Compiles dominate: they optimise less, and what one test or subprocess has compiled, the next one reads.
FLAGS = "--xla_backend_optimization_level=1"
if jax.__version_info__ < (0, 11):  # Later ones do not know this flag.
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
CACHE = tempfile.TemporaryDirectory()
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
jax.config.update("jax_compilation_cache_dir", CACHE.name)

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """The files that take minutes come first, so that no worker is left alone with them."""
    items.sort(key=lambda item: item.path.stem not in ("test_sharding", "test_faults"))


# Steps of a moderate VE, so that samplers with few steps stand a chance.
PROCESSES = {"VP": sj.VP(), "SubVP": sj.SubVP(), "VE": sj.VE(sigma_min=0.01, sigma_max=20.0)}
OTHERS = {cls.__name__: cls() for cls in (sj.Cosine, sj.EDM, sj.RectifiedFlow, sj.OrnsteinUhlenbeck, sj.DDPM)}


@pytest.fixture(params=PROCESSES)
def sde(request):
    return PROCESSES[request.param]


@pytest.fixture(params=PROCESSES | OTHERS)
def any_sde(request):
    return (PROCESSES | OTHERS)[request.param]


@pytest.fixture(scope="session")
def mixture():
    """Unequal weights, means off the origin, one correlated and one anisotropic covariance."""
    return sj.GaussianMixture(
        jnp.array([0.7, 0.3]),
        jnp.array([[1.5, 0.5], [-1.5, -1.0]]),
        jnp.array([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]]]),
    )


def moments(mixture):
    """Mean and covariance of a mixture, in closed form."""
    mean = mixture.weights @ mixture.means
    centred = mixture.means - mean[None]
    between = jnp.einsum("k,kd,ke->de", mixture.weights, centred, centred)
    return mean, jnp.einsum("k,kde->de", mixture.weights, mixture.covariances) + between


def mode_share(mixture, x):
    """The posterior probability of the first component for each of samples `[n, d]`."""
    parts = zip(np.asarray(mixture.weights), mixture.means, mixture.covariances, strict=True)
    joint = np.stack([np.log(w) + multivariate_normal(m, c).logpdf(x) for w, m, c in parts])
    return softmax(joint, axis=0)[0]


PUBLISHED = json.loads((pathlib.Path(__file__).parent / "data/published_configs.json").read_text())


def published(name):
    """The settings of an experiment as the release nests them."""
    nested = {}
    for field, value in (PUBLISHED["common"] | PUBLISHED[name]).items():
        group, *rest = field.split(".")
        nested.setdefault(group, {})[".".join(rest)] = value
    return nested
