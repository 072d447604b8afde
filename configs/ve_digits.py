"""VE on digits, in EDM's preconditioning: the network sees inputs of unit variance at every noise level."""

from configs.base import digits


def get_config():
    config = digits(name="VE", sigma_min=0.01, sigma_max=20.0)
    config.parameterization = dict(name="preconditioned", sigma_data=0.7)
    config.conditioning = "none"
    config.sampling.t_min = 1e-5
    return config
