"""Progressive distillation of `edm_digits` to 8 steps; `progressive_digits.py:4` of that to 4, and so on to 1."""

from configs import edm_digits


def get_config(steps):
    if steps not in ("8", "4", "2", "1"):
        raise ValueError(f"the steps of the student are 8, 4, 2 or 1, not {steps!r}")
    config, n = edm_digits.get_config(), int(steps)
    teacher = "runs/edm_digits" if n == 8 else f"runs/progressive_digits_{2 * n}"
    config.training.update(objective="progressive_distillation", num_steps=1000, learning_rate=2e-3)
    config.training.distillation.update(teacher=teacher, grid="karras", num_steps=2 * n)
    config.sampling.update(sampler=dict(name="ddim"), grid="karras", num_steps=n, denoise=False)
    return config
