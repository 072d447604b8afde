"""NCSN on digits: a small network and ladder, the rest of the levels chosen from the data."""

from configs.base import digits, ladder


def get_config():
    config = digits()
    ladder(config, num_levels=10, sigma_max=3.0, step_size="auto", steps_per_level=10)
    config.network = dict(name="NCSN", features=16, multipliers=(1, 2, 2, 2))
    config.network.num_levels = config.get_ref("num_levels")
    config.training.num_steps = 1500
    return config
