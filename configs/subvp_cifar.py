"""SubVP on CIFAR-10 as published: DDPM++, or another network, `--config=configs/subvp_cifar.py:ncsnpp_deep` say."""

from configs.base import ncsnpp, score_sde


def get_config(network="ddpmpp"):
    deep = network.endswith("_deep")
    return score_sde("cifar10", 32, ncsnpp(network), deep=deep, name="SubVP", beta_min=0.1, beta_max=20.0)
