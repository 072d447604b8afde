"""A classifier of noisy digits, to guide `vp_digits` and `vp_digits_conditional`."""

from configs.base import digits


def get_config():
    config = digits(name="VP", beta_min=0.1, beta_max=20.0)
    config.network.update(name="Classifier", num_classes=10, dropout=0.1)
    config.training.update(num_steps=1500, learning_rate=2e-3, objective="cross_entropy")
    return config
