"""NCSNv2 (Deeper) on LSUN's churches at 96 pixels, as published.

Bedrooms and towers, at 128 pixels, were sigma_max=190.0, num_levels=1086, step_size=1.8e-6, steps_per_level=3 and
num_steps=150_000.
"""

from configs.base import ncsnv2


def get_config():
    return ncsnv2(
        "lsun/church_outdoor",
        image_size=96,
        multipliers=(1, 2, 2, 4, 4),
        sigma_max=140.0,
        num_levels=788,
        step_size=4.9e-6,
        steps_per_level=4,
        num_steps=200_000,
    )
