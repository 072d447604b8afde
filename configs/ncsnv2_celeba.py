"""NCSNv2 on CelebA at 64 pixels, as published."""

from configs.base import ncsnv2


def get_config():
    return ncsnv2(
        "celeb_a",
        image_size=64,
        multipliers=(1, 2, 2, 2),
        sigma_max=90.0,
        num_levels=500,
        step_size=3.3e-6,
        steps_per_level=5,
        num_steps=210_000,
    )
