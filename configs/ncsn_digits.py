"""NCSN's ladder, objective and annealed Langevin dynamics on digits, with the U-Net of the other digits experiments.

A CPU trains it several times faster than a RefineNet; `ncsnv2_digits` has one.  The network predicts the velocity,
which on VE is the noise where there is little and the data where there is much.
"""

from configs.base import digits, ladder


def get_config():
    config = digits()
    ladder(config, num_levels=40, sigma_max=3.0, step_size="auto", steps_per_level=5)
    config.parameterization.name = "from_velocity"
    config.conditioning = "noise_level"
    config.network.embedding = "fourier"
    return config
