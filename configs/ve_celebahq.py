"""VE on CelebA-HQ at 256 pixels as published, with NCSN++."""

from configs.base import ve_256


def get_config():
    return ve_256("celeb_a_hq/256", sigma_max=348.0)
