"""Experiments of the score-SDE family have the published hyperparameters, which the table of its release states."""

import pytest
from conftest import published
from test_experiment import get_config

from score_jax import experiment
from score_jax.pretrained import score_sde
from score_jax.sde import DDPM

# Published names to ours; where two of ours differ only in a category, one stands for both.
EXPERIMENTS = {
    **{f"{sde}/cifar10_{n}_continuous": (f"{sde}_cifar", n) for sde in ("vp", "subvp") for n in ("ddpmpp", "ncsnpp")},
    **{
        f"{sde}/cifar10_{n}_deep_continuous": (f"{sde}_cifar", f"{n}_deep")
        for sde in ("vp", "subvp")
        for n in ("ddpmpp", "ncsnpp")
    },
    "vp/ddpm/cifar10_continuous": ("vp_cifar", "ddpm"),
    "subvp/cifar10_ddpm_continuous": ("subvp_cifar", "ddpm"),
    "ve/cifar10_ncsnpp_continuous": ("ve_cifar", "ncsnpp"),
    "ve/cifar10_ncsnpp_deep_continuous": ("ve_cifar", "ncsnpp_deep"),
    "ve/cifar10_ncsnpp": ("smld_cifar", "ncsnpp"),
    "ve/cifar10_ddpm": ("smld_cifar", "ddpm"),
    "ve/celeba_ncsnpp": ("smld_celeba",),
    "vp/ddpm/cifar10": ("ddpm_cifar", "ddpm"),
    "vp/cifar10_ddpmpp": ("ddpm_cifar", "ddpmpp"),
    "vp/cifar10_ncsnpp": ("ddpm_cifar", "ncsnpp"),
    "vp/ddpm/celebahq": ("ddpm_celebahq",),
    "vp/ddpm/bedroom": ("ddpm_lsun",),
    "vp/ddpm/church": ("ddpm_lsun", "church_outdoor"),
    "ve/celebahq_256_ncsnpp_continuous": ("ve_celebahq",),
    "ve/ffhq_256_ncsnpp_continuous": ("ve_ffhq",),
    "ve/bedroom_ncsnpp_continuous": ("ve_lsun",),
    "ve/church_ncsnpp_continuous": ("ve_lsun", "church_outdoor"),
}
# On VP their ancestral sampling adds sqrt(beta) z.
PREDICTORS = {"ancestral_sampling": "ddpm"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_hyperparameters_are_the_published(name):
    theirs, config = published(name), get_config(*EXPERIMENTS[name])
    model, training = theirs["model"], theirs["training"]
    assert experiment.make_network(config) == score_sde.network_of(theirs)

    sde, expected = experiment.make_sde(config), score_sde.process_of(theirs)[0]
    for t in (0.001, 0.3, 1.0):
        assert float(sde.alpha(t)) == pytest.approx(float(expected.alpha(t)), rel=1e-5)
        assert float(sde.sigma(t)) == pytest.approx(float(expected.sigma(t)), rel=1e-5)

    assert config.training.num_steps == training["n_iters"] - 1
    assert config.training.batch_size == training["batch_size"]
    assert config.training.reduce_mean == training["reduce_mean"]
    assert config.training.learning_rate == theirs["optim"]["lr"]
    assert config.training.warmup_steps == theirs["optim"]["warmup"]
    assert config.training.grad_clip == theirs["optim"]["grad_clip"]
    assert config.training.ema_decay == model["ema_rate"]
    discrete = "draw_steps" if isinstance(sde, DDPM) else "draw_levels"
    assert config.training.times == ("draw_uniform" if training["continuous"] else discrete)

    data = theirs["data"]
    assert (config.data.centered, config.data.image_size) == (data["centered"], data["image_size"])
    assert (config.data.random_flip, config.data.dequantize) == (data["random_flip"], data["uniform_dequantization"])
    assert config.data.crop == (140 if data["dataset"] == "CELEBA" else 0)

    predictor = theirs["sampling"]["predictor"]
    assert config.sampling.sampler.name == PREDICTORS.get(predictor, predictor)
    if theirs["sampling"]["corrector"] == "langevin":
        corrector = dict(name="langevin_corrector", snr=theirs["sampling"]["snr"])  # One step each, by default.
        assert config.sampling.corrector.to_dict() == corrector
        assert theirs["sampling"]["n_steps_each"] == 1
    else:
        assert not config.sampling.corrector.name
    assert config.sampling.t_min == (1e-5 if training["sde"] == "vesde" else 1e-3)
    # With the denoising step, where the chain is discrete.
    assert config.sampling.num_steps + (not training["continuous"]) == model["num_scales"]
    assert config.sampling.denoise == theirs["sampling"]["noise_removal"]


@pytest.mark.parametrize("name", ["ncsn_mnist", "ncsn_cifar", "ncsn_celeba", "ncsnv2_cifar", "ncsnv2_celeba"])
def test_images_of_ncsn_are_made_as_published(name):
    """Song & Ermon 2019 train on (255 x + u)/256, in 2020 on x in [0, 1]; of CelebA on the central 140 pixels."""
    data = get_config(name).data
    assert data.dequantize == ("v2" not in name)
    assert data.crop == (140 if "celeba" in name else 0)
    assert not data.centered
