"""NCSN on CelebA at 32 pixels, as published."""

from configs.base import ncsn


def get_config():
    return ncsn("celeb_a", image_size=32, features=128)
