"""VE on LSUN's bedrooms at 256 pixels as published, or `--config=configs/ve_lsun.py:church_outdoor`."""

from configs.base import ve_256


def get_config(category="bedroom"):
    return ve_256(f"lsun/{category}", sigma_max=380.0 if category == "church_outdoor" else 378.0)
