"""NCSNv2 (Deepest) on FFHQ at 256 pixels, as published; the images lie in --config.data.dir."""

from configs.base import ncsnv2


def get_config():
    config = ncsnv2(
        "folder",
        image_size=256,
        multipliers=(1, 2, 2, 2, 4, 4),
        sigma_max=348.0,
        num_levels=2311,
        step_size=9e-7,
        steps_per_level=3,
        num_steps=80_000,
    )
    config.training.batch_size = 32
    return config
