"""VE on CIFAR-10: data in [0, 1], half-sum loss and a shorter average than the VP experiments."""

from configs.base import cifar


def get_config():
    config = cifar(name="VE", sigma_min=0.01, sigma_max=50.0)
    config.conditioning = "noise_level"
    config.network.embedding = "fourier"
    config.data.centered = False
    config.training.update(reduce_mean=False, ema_decay=0.999)
    config.sampling.t_min = 1e-5
    return config
