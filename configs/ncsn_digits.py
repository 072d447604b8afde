"""NCSN on digits: a small network, a short ladder, and the step size that suits it."""

from configs.base import digits, ladder, ncsn_network


def get_config():
    config = digits()
    ladder(config, num_levels=10, sigma_max=3.0, step_size="auto", steps_per_level=10)
    config.network = ncsn_network(config, features=16, multipliers=(1, 2, 2, 2))
    config.training.num_steps = 1500
    return config
