"""NCSN on digits: a small network and a fine ladder; as in NCSNv2, its output is divided by the noise level."""

from configs.base import digits, ladder, ncsn_network


def get_config():
    config = digits()
    ladder(config, num_levels=20, sigma_max=3.0, step_size="auto", steps_per_level=5)
    config.parameterization.name = "from_noise"
    config.network = ncsn_network(config, features=16, multipliers=(1, 2, 2, 2))
    config.training.num_steps = 1500
    return config
