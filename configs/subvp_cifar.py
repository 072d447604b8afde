"""SubVP on cifar."""

from configs.base import cifar


def get_config():
    return cifar(name="SubVP", beta_min=0.1, beta_max=20.0)
