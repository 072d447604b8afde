"""VP on cifar."""

from configs.base import cifar


def get_config():
    return cifar(name="VP", beta_min=0.1, beta_max=20.0)
