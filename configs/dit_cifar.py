"""VP on CIFAR-10 with DiT-S/2, trained as its authors do (Peebles & Xie 2023); B, L or XL: `dit_cifar.py:XL` say."""

from configs.base import base

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def get_config(size="S"):
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r} of DiT; there are {', '.join(SIZES)}")
    width, depth, heads = SIZES[size]
    config = base()
    config.sde = dict(name="VP", beta_min=0.1, beta_max=20.0)
    fields = dict(num_classes=0, dtype="float32", remat=False)
    config.network = dict(name="DiT", width=width, depth=depth, heads=heads, patch=2, **fields)
    config.data.update(name="cifar10", image_size=32, random_flip=True)
    training = dict(num_steps=400_000, batch_size=256, learning_rate=1e-4, warmup_steps=0, ema_decay=0.9999)
    config.training.update(**training, checkpoint_every=10_000)
    config.evaluation.num_samples = 50_000
    return config
