"""NCSNv2 on CIFAR-10, as published."""

from configs.base import ncsnv2


def get_config():
    return ncsnv2(
        "cifar10",
        image_size=32,
        multipliers=(1, 2, 2, 2),
        sigma_max=50.0,
        num_levels=232,
        step_size=6.2e-6,
        steps_per_level=5,
        num_steps=300_000,
    )
