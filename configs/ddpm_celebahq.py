"""DDPM on CelebA-HQ at 256 pixels as published."""

from configs.base import ddpm_256


def get_config():
    return ddpm_256("celeb_a_hq/256")
