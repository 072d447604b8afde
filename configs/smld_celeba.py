"""A ladder of 1,000 noise levels on CelebA at 64 pixels as published, with NCSN++."""

from configs.base import ncsnpp, score_sde, variance_exploding


def get_config():
    config = score_sde("celeb_a", 64, ncsnpp("ncsnpp"), name="VE", sigma_min=0.01, sigma_max=90.0)
    return variance_exploding(config, snr=0.17, num_levels=1000)
