"""NCSNv2 on digits: the largest noise level and the step size chosen from the data, as its techniques do."""

from configs.base import digits, ladder, ncsnv2_network


def get_config():
    config = digits()
    ladder(config, num_levels=20, sigma_max="auto", step_size="auto", steps_per_level=5)
    config.network = ncsnv2_network(config, features=16, multipliers=(1, 2, 2, 2))
    config.training.num_steps = 1500
    return config
