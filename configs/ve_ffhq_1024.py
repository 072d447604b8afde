"""VE on FFHQ at 1,024 pixels, with NCSN++ (Song et al. 2021, Appendix H.3); `--config.data.dir=DIR` is a folder."""

from configs.base import ve_256


def get_config():
    config = ve_256("folder", sigma_max=1348.0)
    config.data.image_size = 1024
    config.network.update(features=16, multipliers=(1, 2, 4, 8, 16, 32, 32, 32), num_blocks=1)
    config.training.update(batch_size=8, reduce_mean=True, ema_decay=0.9999)
    config.sampling.update(batch_size=4, num_samples=4)
    config.sampling.corrector.snr = 0.15
    return config
