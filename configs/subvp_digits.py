"""SubVP on digits."""

from configs.base import digits


def get_config():
    return digits(name="SubVP", beta_min=0.1, beta_max=20.0)
