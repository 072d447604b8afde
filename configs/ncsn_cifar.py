"""NCSN on CIFAR-10, as published."""

from configs.base import ncsn


def get_config():
    return ncsn("cifar10", image_size=32, features=128)
