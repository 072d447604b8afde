"""NCSNv2 on digits: the largest noise level is the largest distance between two, the step size suits the ladder."""

from configs.base import digits, ladder, ncsnv2_network


def get_config():
    config = digits()
    ladder(config, num_levels=20, sigma_max=4.8, step_size="auto", steps_per_level=5)
    config.network = ncsnv2_network(config, features=16, multipliers=(1, 2, 2, 2))
    config.training.num_steps = 1500
    return config
