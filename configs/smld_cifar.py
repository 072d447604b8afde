"""A ladder of 1,000 noise levels on CIFAR-10 as published: NCSN++, or `--config=configs/smld_cifar.py:ddpm`."""

from configs.base import ncsnpp, score_sde, variance_exploding


def get_config(network="ncsnpp"):
    config = score_sde("cifar10", 32, ncsnpp(network), name="VE", sigma_min=0.01, sigma_max=50.0)
    return variance_exploding(config, snr=0.16, num_levels=1000)
