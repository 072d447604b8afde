"""What experiments share: every field of a config, with its default; an experiment states what differs."""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """All fields but `sde` and `network`, which an experiment must choose."""
    return ConfigDict(
        dict(
            seed=0,
            # What the network predicts (score_jax.parameterization), and the value that it is given beside x:
            # 'time' is 999 t, 'noise_level' is sigma(t), 'none' is what the parameterization passes on.
            parameterization=dict(name="from_noise"),
            conditioning="time",
            data=dict(
                name="digits",
                dir="",  # '': the default of tensorflow-datasets
                image_size=0,  # 0: as stored
                centered=True,  # to [-1, 1]; otherwise [0, 1]
                random_flip=False,
                dequantize=False,
            ),
            training=dict(
                num_steps=4000,
                batch_size=64,
                learning_rate=2e-4,
                warmup_steps=200,
                decay="constant",  # or 'cosine'
                grad_clip=1.0,
                ema_decay=0.999,
                times="draw_uniform",
                weighting="variance_weighting",
                reduce_mean=True,  # loss: mean over dimensions; otherwise half the sum
                log_every=100,
                checkpoint_every=1000,
            ),
            sampling=dict(
                sampler=dict(name="heun"),
                corrector=dict(name=""),  # '': none
                grid="karras",
                num_steps=18,
                t_min=1e-3,
                denoise=True,  # end with the posterior mean (Tweedie)
                num_samples=64,
                batch_size=512,
            ),
            evaluation=dict(num_samples=512, classifier=False),
        )
    )


def unet(**fields) -> dict:
    """A U-Net, unconditional and told the time."""
    return dict(name="UNet", embedding="positional", num_classes=0, **fields)


def digits(**sde) -> ConfigDict:
    """scikit-learn's 8x8 digits, in minutes on a CPU."""
    config = base()
    config.sde = sde
    config.network = unet(
        features=16,
        multipliers=(1, 2),
        num_blocks=1,
        attention_at=(),
        dropout=0.0,
    )
    config.training.update(num_steps=3000, learning_rate=4e-3, decay="cosine", times="draw_stratified")
    config.sampling.update(sampler=dict(name="ancestral"), num_steps=100, num_samples=512)
    config.evaluation.classifier = True
    return config


def cifar(**sde) -> ConfigDict:
    """CIFAR-10 with the hyperparameters of Song et al. 2021: the shared ones of the score-SDE family."""
    config = base()
    config.sde = sde
    config.network = unet(
        features=128,
        multipliers=(1, 2, 2, 2),
        num_blocks=4,
        attention_at=(16,),
        dropout=0.1,
    )
    config.data.update(name="cifar10", image_size=32, random_flip=True)
    config.training.update(
        num_steps=1_300_000,
        batch_size=128,
        learning_rate=2e-4,
        warmup_steps=5000,
        ema_decay=0.9999,
        log_every=50,
        checkpoint_every=10_000,
    )
    config.sampling.update(num_samples=16, batch_size=64)
    config.evaluation.num_samples = 50_000
    return config
