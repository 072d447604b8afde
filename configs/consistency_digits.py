"""A consistency model of digits, distilled from `edm_digits`: samples in one evaluation."""

from configs import edm_digits


def get_config():
    config = edm_digits.get_config()
    config.training.objective = "consistency_distillation"
    config.training.distillation.update(teacher="runs/edm_digits", grid="karras", num_steps=18)
    config.sampling.update(sampler=dict(name="consistency"), grid="karras", num_steps=1, denoise=False)
    return config
