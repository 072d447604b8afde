"""NCSN on MNIST, as published."""

from configs.base import ncsn


def get_config():
    return ncsn("mnist", image_size=28, features=64)
