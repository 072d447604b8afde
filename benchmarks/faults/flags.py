"""Mistaken flags of `run.py`, each in a process: the line that is told has to name the field and what it must be.

None of them trains: a process whose flags are right ends at the missing checkpoint, which is told, too.
"""

import os
import pathlib
import tempfile
from collections.abc import Iterator

from benchmarks import faults

# Longer than any of them takes beside other work: without it `import jax` takes a second.
SECONDS = 60.0
RIGHT = "has no checkpoint: train first"

# Settings of fields, and words of the line: of configs/vp_digits.py, if nothing else is told.
VALUES = {
    "seed=-1": "config.seed must be a whole number, at least 0",
    "seed=4294967296": "config.seed must be a whole number, at least 0 and less than 4294967296",
    "seed=1e3": "config.seed=1e3",
    "num_levels=-1": "config.num_levels must be a whole number, at least 0",
    "conditioning=tme": "config.conditioning: unknown name 'tme'; did you mean 'time'",
    "mesh.data=0": "config.mesh: data=0",
    "mesh.tensor=-2": "config.mesh.tensor must be a whole number, at least -1",
    "distributed.process_id=-1": "config.distributed.process_id must be a whole number, at least 0",
    "data.name=digit": "did you mean 'digits'",
    "data.image_size=-8": "config.data.image_size must be a whole number, at least 0",
    "data.crop=-1": "config.data.crop must be a whole number, at least 0",
    "data.random_flip=maybe": "config.data.random_flip=maybe",
    "data.dir=s3://bucket/images": "config.data.dir: 's3://bucket/images' is no path of this machine: mount it",
    "training.num_steps=0": "config.training.num_steps must be a whole number, at least 1",
    "training.num_steps=abc": "config.training.num_steps=abc",
    "training.num_steps=1.5": "config.training.num_steps=1.5",
    "training.num_steps=None": "config.training.num_steps=None",
    "training.batch_size=0": "config.training.batch_size must be a whole number, at least 1",
    "training.learning_rate=nan": "config.training.learning_rate must be a finite number, at least 0, got nan",
    "training.learning_rate=inf": "config.training.learning_rate must be a finite number, at least 0, got inf",
    "training.learning_rate=-1e-3": "config.training.learning_rate must be a finite number, at least 0",
    "training.learning_rate=1e-3x": "config.training.learning_rate=1e-3x",
    "training.warmup_steps=-1": "config.training.warmup_steps must be a whole number, at least 0",
    "training.decay=linear": "config.training.decay must be 'constant' or 'cosine'",
    "training.grad_clip=-1": "config.training.grad_clip must be a number, above 0",
    "training.grad_clip=0": "config.training.grad_clip must be a number, above 0",
    "training.grad_clip=inf": RIGHT,
    "training.ema_decay=1": "config.training.ema_decay must be a finite number, at least 0 and less than 1",
    "training.ema_decay=nan": "config.training.ema_decay must be a finite number",
    "training.accumulate=0": "config.training.accumulate must be a whole number, at least 1",
    "training.max_skipped=-1": "config.training.max_skipped must be a whole number, at least 0",
    "training.label_dropout=1.5": "config.training.label_dropout must be a finite number, at least 0 and less than 1",
    "training.objective=denoise": "config.training.objective: unknown name 'denoise'",
    "training.times=draw": "config.training.times: unknown name 'draw'",
    "training.weighting=": "config.training.weighting: unknown name ''",
    "training.log_every=0": "config.training.log_every must be a whole number, at least 1",
    "training.checkpoint_every=-5": "config.training.checkpoint_every must be a whole number, at least 1",
    "training=5": "config.training=5",
    "sde.name=": "config.sde: unknown name ''",
    "sde.beta_max=nan": "config.sde.beta_max must be a finite number, got nan",
    "sde.beta_max=inf": "config.sde.beta_max must be a finite number, got inf",
    "sde.beta_min=0": "0 < beta_min <= beta_max",
    "sde.beta_min=30": "0 < beta_min <= beta_max",
    "network=5": "config.network=5",
    "network.name=Unett": "config.network: unknown name 'Unett'; did you mean 'UNet'",
    "network.features=0": "config.network: UNet needs features of at least 1, got 0",
    "network.features=-4": "config.network: UNet needs features of at least 1, got -4",
    "network.multipliers=": "config.network: UNet needs multipliers of at least 1, got ('',)",
    "network.multipliers=(1,0)": "config.network: UNet needs multipliers of at least 1, got (1, 0)",
    "network.multipliers=two": "config.network: UNet needs multipliers of at least 1, got ('two',)",
    "network.multipliers=(1.5,)": "config.network: UNet needs multipliers of at least 1, got (1.5,)",
    "network.num_blocks=-1": "config.network: UNet needs num_blocks of at least 1, got -1",
    "network.num_classes=-1": "config.network.num_classes",
    "network.dropout=nan": "config.network.dropout must be",
    "network.dropout=-0.1": "config.network.dropout must be at least 0 and less than 1",
    "network.dtype=float64": "config.network: unknown dtype 'float64'; there are float32, bfloat16, float16",
    "network.dtype=float16": "config.network.dtype: a CPU does not compute in 'float16'",
    "network.embedding=sine": "config.network: unknown embedding 'sine'",
    "sampling.sampler.name=huen": "config.sampling.sampler: unknown name 'huen'; did you mean 'heun'",
    "sampling.sampler.order=7": "config.sampling.sampler: a multistep sampler has order 1, 2 or 3, got 7",
    "sampling.sampler.order=2.5": "config.sampling.sampler.order must be a whole number, 2 say, got 2.5",
    "sampling.sampler.order=None": "config.sampling.sampler.order must be a whole number, 2 say, got None",
    "sampling.sampler.name=ddim sampling.sampler.eta=nan": "sampler.eta must be a number, 0.0 say, got 'nan'",
    "sampling.sampler.name=ddim sampling.sampler.eta=2": "config.sampling.sampler: ddim needs 0 <= eta <= 1",
    "sampling.sampler.name=stochastic_heun sampling.sampler.noise_max=1e999": RIGHT,
    "sampling.sampler.name=stochastic_heun sampling.sampler.churn=-1": "needs churn >= 0",
    "sampling.corrector.name=langevin_corrector sampling.corrector.snr=-1": "a Langevin corrector needs snr >= 0",
    "sampling.corrector.name=langevin_corrector sampling.corrector.num_steps=-1": "a Langevin corrector needs",
    "sampling.guidance.scale=nan": "config.sampling.guidance.scale must be a finite number, at least 0, got nan",
    "sampling.guidance.scale=-1": "config.sampling.guidance.scale must be a finite number, at least 0, got -1",
    "sampling.guidance.interval=5": "config.sampling.guidance.interval: nothing takes it: set",
    "sampling.grid=karas": "config.sampling.grid: unknown name 'karas'; did you mean 'karras'",
    "sampling.num_steps=0": "config.sampling.num_steps must be a whole number, at least 1",
    "sampling.step_size=big": "config.sampling.step_size must be 'auto' or a finite number, at least 0, got 'big'",
    "sampling.step_size=-1": "config.sampling.step_size must be 'auto' or a finite number, at least 0, got -1",
    "sampling.t_min=0": "config.sampling.t_min must be a finite number, above 0",
    "sampling.t_min=nan": "config.sampling.t_min must be a finite number, above 0, got nan",
    "sampling.t_min=2": "config.sampling.t_min: VP needs 0 < t_min < t_max, got t_min=2",
    "sampling.num_samples=0": "config.sampling.num_samples must be a whole number, at least 1",
    "sampling.batch_size=-1": "config.sampling.batch_size must be a whole number, at least 1",
    "editing.noise_std=nan": "config.editing.noise_std must be a finite number, at least 0, got nan",
    "editing.num_between=-1": "config.editing.num_between must be a whole number, at least 0",
    "editing.temperature=0": "config.editing.temperature must be a finite number, above 0",
    "evaluation.num_samples=1": "config.evaluation.num_samples must be a whole number, at least 2",
    "evaluation.likelihood.rtol=0": "config.evaluation.likelihood.rtol must be a finite number, above 0",
    "evaluation.likelihood.atol=nan": "config.evaluation.likelihood.atol must be a finite number, above 0, got nan",
    "evaluation.likelihood.num_probes=0": "config.evaluation.likelihood.num_probes must be a whole number, at least 1",
    "evaluation.likelihood.dequantizer_steps=-1": "dequantizer_steps must be a whole number, at least 0",
    "evaluation.statistics=gs://bucket/s.npz": "config.evaluation.statistics: 'gs://bucket/s.npz' is no path of this",
    "trainin.num_steps=3": "--config has no field 'trainin'; did you mean 'training'",
    "training.num_step=3": "--config has no field 'num_step'; did you mean 'num_steps'",
    "seed.x=3": "config.seed.x=3: a value, 0, has no field 'x'",
    "=3": "--config.=3: --config has no field ''",
    "training..num_steps=3": "--config has no field ''",
}

CONFIG = "--config=configs/vp_digits.py"
FLAGS = {
    ("",): "--config is missing",
    ("--config=",): "--config is missing",
    ("--config=configs/vp_digit.py",): "'configs/vp_digit.py' does not exist",
    ("--config=configs",): "'configs' is a directory",
    ("--config=README.md",): "'README.md' is no Python file",
    ("--config=configs/base.py",): "configs/base.py has no function get_config",
    ("--config=configs/vp_digits.py:word",): "configs/vp_digits.py takes no word behind a colon",
    ("--config=configs/vp_cifar.py:word",): "unknown network 'word'; there are ddpm",
    ("--config=configs/progressive_digits.py",): "needs a word behind a colon",
    ("--config=configs/progressive_digits.py:seven",): "'seven'",
    ("--config.seed=3", CONFIG): "--config.seed=3 in argv before a value for --config",
    (CONFIG, "--config"): "Missing value for flag --config",
    (CONFIG, "--config.training.num_steps"): "config.training.num_steps",
    (CONFIG, "--mode=smaple"): "--mode: unknown name 'smaple'; did you mean 'sample'",
    (CONFIG, "--mode="): "--mode: unknown name ''",
    (CONFIG, "--mode"): "Missing value for flag --mode",
    (CONFIG, "--mod=sample"): "'mod'. Did you mean: mode",
    (CONFIG, "\N{EM DASH}mode=sample"): "unexpected argument '\N{EM DASH}mode=sample'",
    (CONFIG, "sample"): "unexpected argument 'sample'",
    (CONFIG, "--flagfile=/nothing/flags"): "Unable to open flagfile",
    (CONFIG, "--mode=train", "-mode", "sample"): RIGHT,
    ("--config=configs/toy2d.py", CONFIG): RIGHT,
    (CONFIG, "--config.seed=1", "--config.seed=0"): RIGHT,
    (
        "--config=configs/vp_digits_conditional.py",
        "--config.sampling.guidance.interval=(nan,1)",
    ): "config.sampling.guidance: interval needs t_low < t_high",
    (
        "--config=configs/vp_digits_conditional.py",
        "--config.sampling.guidance.interval=5",
    ): "config.sampling.guidance: interval needs t_low < t_high, got (5,)",
}


def workdirs(root: pathlib.Path) -> dict[str, str]:
    """Directories of runs, and words of the line."""
    (root / "file").touch()
    (root / "dangling").symlink_to(root / "nothing")
    (root / "mine").mkdir()
    (root / "mine/thesis.tex").touch()
    return {
        "": "--workdir is empty",
        "gs://bucket/run": "--workdir: 'gs://bucket/run' is no path of this machine: mount it",
        "s3://bucket/run": "--workdir: 's3://bucket/run' is no path of this machine: mount it",
        "~nobody_of_that_name/run": "there is no such home directory",
        "~/run": RIGHT,
        f"{root}/{'a' * 300}": "File name too long",
        f"{root}/dangling": "dangling is a link to nothing",
        f"{root}/dangling/run": "dangling is a link to nothing",
        f"{root}/file": "file is a file",
        f"{root}/file/run": "file is a file",
        f"{root}/mine": "mine is not empty",
        "/proc/run": "cannot make the directory /proc/run",
        f"{root}/mine/../run/": RIGHT,
        f"{root}/with spaces and \N{GREEK SMALL LETTER SIGMA}": RIGHT,
    }


def trials() -> Iterator[faults.Trial]:
    """Each alone; the slowest is printed in the end."""
    slowest = 0.0, ""
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        here, sample = f"--workdir={root / 'run'}", "--mode=sample"
        cases = [
            (values, [CONFIG, sample, here, *(f"--config.{v}" for v in values.split(" "))], words)
            for values, words in VALUES.items()
        ]
        cases += [(" ".join(flags), [here, sample, *filter(None, flags)], words) for flags, words in FLAGS.items()]
        cases += [(path[-40:], [CONFIG, sample, f"--workdir={path}"], words) for path, words in workdirs(root).items()]
        for name, flags, words in cases:
            ended = faults.run(["run.py", *flags], seconds=SECONDS, HOME=directory)
            slowest = max(slowest, (ended.seconds, name))
            verdict, detail = faults.verdict(ended)
            if verdict in faults.PASSED and words not in ended.output:
                verdict, detail = "silent", f"{detail or 'exit code 0'}, without {words!r}"
            yield faults.Trial(name, verdict, detail)
    print(f"  flags: the slowest took {slowest[0]:.1f} s: {slowest[1]}", flush=True)
    if os.path.exists(faults.ROOT / "gs:") or os.path.exists(faults.ROOT / "s3:"):
        yield faults.Trial("no directory is named by an address", "silent", "gs: or s3: was made")
