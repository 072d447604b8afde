"""VE on FFHQ at 256 pixels as published, with NCSN++; the images are a folder, `--config.data.dir=DIR`."""

from configs.base import ve_256


def get_config():
    return ve_256("folder", sigma_max=348.0)
