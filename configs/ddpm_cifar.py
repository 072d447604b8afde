"""DDPM's chain on CIFAR-10 as published, or with another network, `--config=configs/ddpm_cifar.py:ddpmpp` say."""

from configs.base import ncsnpp, score_sde


def get_config(network="ddpm"):
    config = score_sde("cifar10", 32, ncsnpp(network), name="DDPM")
    if network == "ncsnpp":
        config.sampling.sampler.name = "reverse_diffusion"
    return config
