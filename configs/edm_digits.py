"""EDM on digits, as published: its process, preconditioning, law of noise levels in training and weighting."""

from configs.base import digits


def get_config():
    config = digits(name="EDM", t_min=0.002, t_max=80.0)
    config.parameterization = dict(name="preconditioned", sigma_data=0.75)
    config.conditioning = "none"
    config.training.update(times="draw_lognormal", weighting="edm_weighting")
    config.sampling.t_min = 0.002
    return config
