"""DDPM's chain and DDPM's network on digits: a form that diffusers reads (`--mode=export`)."""

from configs.base import digits


def get_config():
    config = digits(name="DDPM")
    config.conditioning = "step"
    config.network.update(resample="conv", rescale=False, groups=4)
    return config
