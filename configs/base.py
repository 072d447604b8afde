"""What experiments share: every field of a config, with its default; an experiment states what differs."""

import copy
import math
from typing import Any

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

# Of each field the default, and what it is; `python run.py --help` prints them.
FIELDS: dict[str, tuple[Any, str]] = {
    "seed": (0, "of all that is random"),
    "parameterization.name": ("from_noise", "what the network predicts (score_jax.parameterization)"),
    "conditioning": (
        "time",
        "what it is given beside x: 'time', 999 t; 'noise_level', sigma(t); 'level', the index in a ladder, from the "
        "largest on; 'step', that in DDPM's chain; 'none', what the parameterization passes on",
    ),
    "num_levels": (0, "of that ladder, for conditioning='level' and times='draw_levels'; 0: none"),
    # Devices (score_jax.sharding).
    "mesh.data": (-1, "over how many devices batches are divided; -1, here and below: all that the others leave"),
    "mesh.fsdp": (1, "over how many of them both batches and parameters are divided"),
    "mesh.tensor": (1, "over how many of them DiT's features are divided"),
    "distributed.enabled": (False, "whether several processes are one run"),
    "distributed.coordinator": ("", "the first one's host:port; '': found out from SLURM, Open MPI, Kubernetes, a TPU"),
    "distributed.num_processes": (0, "how many they are, where there is a coordinator"),
    "distributed.process_id": (0, "which of them this is, from 0"),
    "data.name": ("digits", "digits, folder, two_moons, checkerboard, or an image data set of tensorflow-datasets"),
    "data.dir": ("", "where it lies; '': the default of tensorflow-datasets"),
    "data.image_size": (0, "images are cropped to a square and resized to this; 0: as stored"),
    "data.crop": (0, "the side of that square, in the middle; 0: the largest"),
    "data.background": ("", "the colour behind transparent pixels, 'black' or '#808080'; '': white"),
    "data.centered": (True, "images are in [-1, 1]; otherwise in [0, 1]"),
    "data.random_flip": (False, "half of the images are mirrored, left to right"),
    "data.dequantize": (False, "uniform noise fills the steps between the 256 grey levels"),
    "training.num_steps": (4000, "steps in all, those of an earlier start included"),
    "training.batch_size": (64, "examples of a step, on all devices together"),
    "training.learning_rate": (2e-4, "of Adam, the peak"),
    "training.warmup_steps": (200, "steps in which the learning rate rises to the peak"),
    "training.decay": ("constant", "of the learning rate after that: 'constant', or 'cosine' to 0 at num_steps"),
    "training.grad_clip": (1.0, "the largest norm of a gradient; inf: any"),
    "training.ema_decay": (0.999, "of the moving average of the parameters, which is what samples; 0: none"),
    "training.objective": ("denoising_score_matching", "of score_jax.losses or score_jax.distillation"),
    "training.times": ("draw_uniform", "how times are drawn (score_jax.timesteps)"),
    "training.weighting": ("variance_weighting", "of the times in the loss (score_jax.losses)"),
    "training.accumulate": (1, "parts of a batch that are taken one after the other, for less memory"),
    "training.max_skipped": (20, "steps in a row whose gradient is not finite; they change nothing, one more ends it"),
    "training.distillation.teacher": (
        "",
        "the workdir of the network that is distilled, whose parameters training begins with; '': that of --pretrained",
    ),
    "training.distillation.grid": ("", "the times of distillation (score_jax.timesteps)"),
    "training.distillation.num_steps": (0, "of that grid"),
    "training.label_dropout": (0.0, "share of labels replaced by 'no class', for classifier-free guidance: 0.1 to 0.2"),
    "training.reduce_mean": (True, "the loss is a mean over dimensions; otherwise half the sum"),
    "training.log_every": (100, "steps from one line of metrics to the next"),
    "training.checkpoint_every": (1000, "steps from one checkpoint to the next"),
    # 20 evaluations with the denoising step, as good as 1,000 of Euler-Maruyama (benchmarks.solvers).
    "sampling.sampler.name": ("sde_dpm_solver_pp", "of score_jax.samplers; its arguments are fields beside the name"),
    "sampling.corrector.name": ("", "a sampler that follows each step of the first; '': none"),
    "sampling.guidance.name": (
        "",
        "'classifier_free_guidance' or 'classifier_guidance' (score_jax.guidance); '': none",
    ),
    "sampling.guidance.scale": (1.0, "how strongly"),
    "sampling.guidance.interval": (placeholder(tuple), "(t_low, t_high): only between these times; None: always"),
    "sampling.guidance.classifier": ("", "the workdir of a classifier, of configs/classifier_digits.py say"),
    "sampling.grid": ("curvature", "the times of sampling (score_jax.timesteps)"),
    "sampling.num_steps": (19, "of that grid"),
    "sampling.step_size": (
        FieldReference(0.0, field_type=object),
        "of annealed Langevin at the smallest level, in the published notation, in place of its corrector's snr; "
        "'auto': by NCSNv2's fourth technique; 0: not used",
    ),
    "sampling.t_min": (1e-3, "the time at which sampling ends"),
    "sampling.denoise": (True, "it ends with the posterior mean (Tweedie)"),
    "sampling.num_samples": (64, "how many training and --mode=sample write"),
    "sampling.batch_size": (512, "how many are made at once"),
    "editing.images": ("", "a file or a folder of images; '': the first sampling.num_samples of the test split"),
    "editing.mask": ("center", "what is hidden: 'center', 'left', 'random', or a file that is black there, and opaque"),
    "editing.operator.name": ("blur", "what restore undoes (score_jax.operators); 'mask' is the one above"),
    "editing.method.name": ("mmps", "how it does that (score_jax.inverse)"),
    "editing.noise_std": (0.1, "of the noise that restore adds to the measurement, in the range of data.centered"),
    "editing.num_between": (6, "images that interpolate puts between two"),
    "editing.temperature": (1.0, "the factor on their latent codes"),
    "evaluation.num_samples": (512, "how many are made, or test images are looked at"),
    "evaluation.features": (
        "pixels",
        "what images are compared by: 'pixels', 'inception', which gives FID, KID and so on as published, or "
        "'efficientnet_lite0' (score_jax.features)",
    ),
    "evaluation.weights": ("", "of that network, a path or URL: pytorch-fid's file; '': those of its package"),
    "evaluation.statistics": (
        "",
        "an .npz of the training images' statistics, pytorch-fid's say: read, or made if it is missing; where it is "
        "read there is neither KID nor precision and recall",
    ),
    "evaluation.classifier": (False, "with pixels: scores by a logistic regression on the labels, too"),
    # Of test images under the probability flow (score_jax.likelihood).
    "evaluation.likelihood.divergence": ("hutchinson", "or 'exact'"),
    "evaluation.likelihood.num_probes": (1, "random directions of 'hutchinson'"),
    "evaluation.likelihood.num_repeats": (1, "draws of an image's dequantization"),
    "evaluation.likelihood.rtol": (1e-4, "the solver's relative tolerance"),
    "evaluation.likelihood.atol": (1e-4, "the solver's absolute tolerance"),
    "evaluation.likelihood.solver": (
        "dopri5",
        "of order 5; or 'tsit5', of order 5, too, 'dopri8', of order 8 (score_jax.ode)",
    ),
    "evaluation.likelihood.dequantizer_steps": (0, "of the fit of a variational dequantizer before; 0: none"),
}

# What an experiment must choose; the arguments of both are fields beside the names.
CHOSEN = {"sde.name": "the process (score_jax.sde)", "network.name": "the network (score_jax.networks)"}


def base() -> ConfigDict:
    """All fields but `sde` and `network`, which an experiment must choose."""
    fields: dict[str, Any] = {}
    for path, (default, _) in FIELDS.items():
        *parts, name = path.split(".")
        node = fields
        for part in parts:
            node = node.setdefault(part, {})
        node[name] = copy.copy(default)  # References are of one config each.
    return ConfigDict(fields)


def unet(**fields) -> dict:
    """A U-Net, unconditional and told the time."""
    return dict(name="UNet", embedding="positional", num_classes=0, dtype="float32", remat=False, **fields)


def ladder(
    config: ConfigDict, *, num_levels: int, sigma_max: float | str, step_size: float | str, steps_per_level: int
) -> None:
    """Make an experiment NCSN's: noise levels down to 0.01, `steps_per_level` Langevin steps at each."""
    config.sde = dict(name="VE", sigma_min=0.01)
    config.sde.sigma_max = FieldReference(sigma_max, field_type=object)  # or 'auto': NCSNv2's first technique
    config.num_levels = num_levels
    config.parameterization.name = "from_score"
    config.conditioning = "level"
    config.data.centered = False
    config.training.times = "draw_levels"
    config.sampling.update(
        sampler=dict(name="annealed_langevin_corrector", num_steps=steps_per_level),
        grid="ladder",
        num_steps=num_levels,
        step_size=step_size,
        t_min=1e-5,
    )


# The side of the central square that published experiments take of images, where it is not the largest.
CROPS = {"celeb_a": 140}

# Of NCSN's and NCSNv2's training, as published: half the sum as the loss, neither warm-up nor clipping.
PUBLISHED = dict(batch_size=128, reduce_mean=False, warmup_steps=0, grad_clip=math.inf, checkpoint_every=5000)


def ncsnv2_network(config: ConfigDict, **fields) -> dict:
    """NCSNv2 for the config's ladder; where that changes, it changes with it."""
    levels = {name: config.sde.get_ref(name) for name in ("sigma_min", "sigma_max")}
    return dict(name="NCSNv2", num_levels=config.get_ref("num_levels"), **levels, **fields)


def ncsn(data: str, *, image_size: int, features: int) -> ConfigDict:
    """NCSN with the hyperparameters of Song & Ermon 2019."""
    config = base()
    ladder(config, num_levels=10, sigma_max=1.0, step_size=2e-5, steps_per_level=100)
    config.network = dict(name="NCSN", features=features, num_levels=config.get_ref("num_levels"))
    images = dict(image_size=image_size, crop=CROPS.get(data, 0), random_flip=data != "mnist", dequantize=True)
    config.data.update(name=data, **images)
    config.training.update(num_steps=200_000, learning_rate=1e-3, ema_decay=0.0, **PUBLISHED)
    config.sampling.denoise = False
    return config


def ncsnv2(data: str, *, image_size: int, multipliers: tuple[int, ...], num_steps: int, **levels) -> ConfigDict:
    """NCSNv2 with the hyperparameters of Song & Ermon 2020; `levels` as in `ladder`."""
    config = base()
    ladder(config, **levels)
    config.network = ncsnv2_network(config, features=128, multipliers=multipliers)
    config.data.update(name=data, image_size=image_size, random_flip=True, crop=CROPS.get(data, 0))
    config.training.update(num_steps=num_steps, learning_rate=1e-4, ema_decay=0.999, **PUBLISHED)
    return config


def digits(**sde) -> ConfigDict:
    """scikit-learn's 8x8 digits, in minutes on a CPU."""
    config = base()
    config.sde = sde
    config.network = unet(
        features=16,
        multipliers=(1, 2),
        num_blocks=1,
        attention_at=(),
        dropout=0.0,
    )
    config.training.update(num_steps=3000, learning_rate=4e-3, decay="cosine", times="draw_stratified")
    config.sampling.num_samples = 512
    config.evaluation.classifier = True
    return config


# The networks of Song et al. 2021, by their names in the paper.
NETWORKS = {
    "ddpm": dict(num_blocks=2, resample="conv", rescale=False, groups=32),
    "ddpmpp": dict(num_blocks=4),
    "ddpmpp_deep": dict(num_blocks=8),
    "ncsnpp": dict(num_blocks=4, taps=(1, 3, 3, 1), progressive_input="residual"),
    "ncsnpp_deep": dict(num_blocks=8, taps=(1, 3, 3, 1), progressive_input="residual"),
}


def ncsnpp(network: str, **fields) -> dict:
    """The network of that name, as it was on CIFAR-10 but for some fields; `config.network`."""
    if network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}; there are {', '.join(NETWORKS)}")
    shared = dict(name="NCSNpp", features=128, multipliers=(1, 2, 2, 2), attention_at=(16,), dropout=0.1, num_classes=0)
    return shared | dict(embedding="positional", dtype="float32", remat=False) | NETWORKS[network] | fields


def score_sde(data: str, image_size: int, network: dict, *, deep: bool = False, **sde) -> ConfigDict:
    """What all experiments of Song et al. 2021 share, and what the process decides.

    Args:
      data: the name of the data set.
      image_size: of its images.
      network: as `ncsnpp` gives it.
      deep: whether training is shorter, as that of the deep networks was.
      **sde: `config.sde`; `DDPM` is VP's chain of 1,000 steps.
    """
    config = base()
    config.sde = sde
    config.network = network
    config.data.update(name=data, image_size=image_size, random_flip=True, crop=CROPS.get(data, 0))
    config.training.update(
        num_steps=950_000 if deep else 1_300_000,
        batch_size=128,
        learning_rate=2e-4,
        warmup_steps=5000,
        ema_decay=0.9999,
        log_every=50,
        checkpoint_every=10_000,
    )
    # As published; the defaults of `base` need 20 evaluations, `--config.sampling.sampler.name=sde_dpm_solver_pp` and
    # `--config.sampling.grid=curvature --config.sampling.num_steps=19`.
    config.sampling.update(
        sampler=dict(name="euler_maruyama"), grid="uniform", num_steps=1000, num_samples=16, batch_size=64
    )
    config.evaluation.num_samples = 50_000
    if sde["name"] == "DDPM":
        config.conditioning = "step"
        config.training.times = "draw_steps"
        config.sampling.sampler.name = "ddpm"
        config.sampling.num_steps = 999  # The last is that of `denoise`.
    return config


def variance_exploding(config: ConfigDict, *, snr: float, num_steps: int = 1000, num_levels: int = 0) -> ConfigDict:
    """Make an experiment that of a VE process: images in [0, 1], half the sum as the loss, predictor and corrector.

    Args:
      config: of `score_sde`.
      snr: of the corrector.
      num_steps: of sampling.
      num_levels: of a ladder to train on and to sample along, the network told the index; 0 for all levels, and sigma.
    """
    levels = {name: config.sde.get_ref(name) for name in ("sigma_min", "sigma_max")} if num_levels else {}
    config.network.update(scale_by_sigma=True, centered=False, num_levels=num_levels, **levels)
    config.network.embedding = "positional" if num_levels else "gaussian_fourier"
    config.num_levels = num_levels
    config.conditioning = "level" if num_levels else "noise_level"
    config.parameterization.name = "from_score"
    config.data.centered = False
    config.training.update(reduce_mean=False, ema_decay=0.999)
    if num_levels:
        config.training.times = "draw_levels"
        num_steps = num_levels - 1
    config.sampling.update(sampler=dict(name="reverse_diffusion"), num_steps=num_steps, t_min=1e-5)
    config.sampling.corrector = dict(name="langevin_corrector", snr=snr)
    return config


def score_sde_256(data: str, network: dict, **sde) -> ConfigDict:
    """What the experiments on images of 256 pixels and more share."""
    config = score_sde(data, 256, network | dict(num_blocks=2, dropout=0.0), **sde)
    config.training.update(num_steps=2_400_000, batch_size=64)
    config.sampling.batch_size = 16
    return config


def ve_256(data: str, sigma_max: float) -> ConfigDict:
    """NCSN++ on images of 256 pixels, with pyramids of inputs and outputs."""
    pyramids = dict(progressive="output_skip", progressive_input="input_skip")
    network = ncsnpp("ncsnpp", multipliers=(1, 1, 2, 2, 2, 2, 2), **pyramids)
    config = score_sde_256(data, network, name="VE", sigma_min=0.01, sigma_max=sigma_max)
    return variance_exploding(config, snr=0.075, num_steps=2000)


def ddpm_256(data: str) -> ConfigDict:
    """DDPM on images of 256 pixels."""
    config = score_sde_256(data, ncsnpp("ddpm", multipliers=(1, 1, 2, 2, 4, 4)), name="DDPM")
    config.training.learning_rate = 2e-5
    return config
