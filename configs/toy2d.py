"""Two moons in two dimensions, in seconds: another toy with --config.data.name=checkerboard."""

from configs.base import base


def get_config():
    config = base()
    config.sde = dict(name="VP", beta_min=0.1, beta_max=20.0)
    config.network = dict(name="MLP", features=128, num_blocks=3, embedding="positional", num_classes=0)
    config.data.name = "two_moons"
    config.training.update(batch_size=512, learning_rate=2e-3, decay="cosine", times="draw_stratified", num_steps=3000)
    config.sampling.num_samples = 2000
    config.evaluation.num_samples = 2000
    return config
