"""VE on CIFAR-10 as published: NCSN++, or deep, `--config=configs/ve_cifar.py:ncsnpp_deep`."""

from configs.base import ncsnpp, score_sde, variance_exploding


def get_config(network="ncsnpp"):
    sde = dict(name="VE", sigma_min=0.01, sigma_max=50.0)
    config = score_sde("cifar10", 32, ncsnpp(network), deep=network.endswith("_deep"), **sde)
    return variance_exploding(config, snr=0.16)
