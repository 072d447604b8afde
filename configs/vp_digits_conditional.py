"""VP on digits of a given class, sampled with classifier-free guidance."""

from configs.base import digits


def get_config():
    config = digits(name="VP", beta_min=0.1, beta_max=20.0)
    config.network.num_classes = 10
    config.training.label_dropout = 0.1
    config.sampling.guidance.update(name="classifier_free_guidance", scale=2.0)
    return config
