"""DDPM on LSUN's bedrooms at 256 pixels as published, or `--config=configs/ddpm_lsun.py:church_outdoor`."""

from configs.base import ddpm_256


def get_config(category="bedroom"):
    return ddpm_256(f"lsun/{category}")
