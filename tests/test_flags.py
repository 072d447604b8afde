"""What a user types: the flags of `run.py` and the examples, their values, and the words that come back."""

import re
import subprocess
import sys

import pytest
import yaml
from test_experiment import ROOT, get_config

from score_jax import experiment


def python(*arguments):
    """A process in the repository's root."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help_lists_flags_modes_and_the_fields_of_the_config(flag):
    """Without JAX, whose import alone takes longer."""
    done = python("-X", "importtime", "run.py", "--config=configs/vp_digits.py", "--config.training.num_steps=7", flag)
    assert done.returncode == 0
    assert not re.search(r"\| +jax$", done.stderr, re.MULTILINE)
    for mode in experiment.MODES:
        assert re.search(rf"^  {mode} +\w+", done.stdout, re.MULTILINE)
    for name in ("--config", "--mode", "--workdir", "--pretrained"):
        assert re.search(rf"^  {name} +\w+", done.stdout, re.MULTILINE)
    assert re.search(r"^  training\.num_steps=7 +steps in all", done.stdout, re.MULTILINE)
    assert re.search(r"^  sde\.beta_max=20\.0 +of VP", done.stdout, re.MULTILINE)
    for name in fields(get_config("vp_digits").to_dict()):
        assert re.search(rf"^  {re.escape(name)}=", done.stdout, re.MULTILINE), name


def fields(node, above=""):
    """The paths of a config's values."""
    for name, value in node.items():
        yield from fields(value, f"{above}{name}.") if isinstance(value, dict) else [above + name]


def test_help_without_a_config_lists_the_fields_of_all():
    done = python("run.py", "--help")
    assert done.returncode == 0
    assert re.search(r"^  training\.learning_rate=0\.0002 +of Adam", done.stdout, re.MULTILINE)
    assert re.search(r"^  sde\.name +the process", done.stdout, re.MULTILINE)


CONFIG_FILES = {
    "def get_config():\n    return {}": r"get_config of \S+config.py returns a dict, and not a ConfigDict",
    "def config():\n    pass": r"config.py has no function get_config",
    "def get_config():\n    x = 1\n    return y": r"NameError: name 'y' is not defined \(line 3 of \S+config.py\)",
    "def get_config(:\n    pass": r"SyntaxError: invalid syntax \(config.py, line 1\)",
    "import no_such_module": r"No module named 'no_such_module' \(line 1 of \S+config.py\)",
    "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict()": r"config.py has no config.seed",
    "from configs.base import digits\ndef get_config():\n    c = digits(name='VP')\n    c.training.num_step = 3\n"
    "    return c": r"sets config.training.num_step, which is no field; did you mean 'training.num_steps'\?",
}


@pytest.mark.parametrize("text", CONFIG_FILES, ids=range(len(CONFIG_FILES)))
def test_a_wrong_config_file_gets_one_line(text, tmp_path):
    (tmp_path / "config.py").write_text(text)
    done = python("run.py", f"--config={tmp_path / 'config.py'}", "--mode=nothing")
    assert done.returncode == 1
    assert re.fullmatch(rf"error: --config: [^\n]*{CONFIG_FILES[text]}[^\n]*\n", done.stderr), done.stderr


def test_the_command_line_gives_arguments_that_a_config_does_not_list(tmp_path):
    """They are on record before there is anything to sample from."""
    given = ["--config.sampling.sampler.name=ddim", "--config.sampling.sampler.eta=0.5"]
    given += ["--config.sampling.corrector.name=langevin_corrector", "--config.sampling.corrector.snr=0.3"]
    command = ["run.py", "--config=configs/toy2d.py", "--mode=sample", f"--workdir={tmp_path / 'w'}"]
    done = python(*command, *given)
    assert "has no checkpoint: train first" in done.stderr
    sampling = yaml.safe_load((tmp_path / "w/config.yaml").read_text())["sampling"]
    assert sampling["sampler"] == {"name": "ddim", "eta": 0.5}
    assert sampling["corrector"] == {"name": "langevin_corrector", "snr": 0.3}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.trainin.num_steps=3"], "no field 'trainin'; did you mean 'training'?"),
        (["--config.training.num_step=3"], "no field 'num_step'; did you mean 'num_steps'?"),
        (
            ["--config.sampling.sampler.name=ddim", "--config.sampling.sampler.et=0.5"],
            "ddim has no parameter 'et'; did",
        ),
        (
            ["--config.sampling.corrector.snr=0.1"],
            "corrector.snr: nothing takes it: set config.sampling.corrector.name",
        ),
        (
            ["--config.sampling.sampler.name=ddim", "--config.sampling.sampler.eta=half"],
            "sampler.eta must be a number, 0.0",
        ),
        (["--config.network.rescale=False"], "no field 'rescale'"),
        (["--mod=train"], "Did you mean: mode"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config.sde.name=VPP"], "did you mean 'VP'?"),
        (["--config=configs/vp_cifar.py:ncsnp"], "--config: unknown network 'ncsnp'; there are ddpm, ddpmpp,"),
        (["--config.seed.x=3"], "--config.seed.x=3: a value, 0, has no field 'x'"),
        (["--config.=3"], "--config has no field ''"),
        (["--flagfile=/nothing"], "Unable to open flagfile"),
        (["--config=configs/toy2d.py:word"], "toy2d.py takes no word behind a colon"),
        (["--config=configs/progressive_digits.py"], "needs a word behind a colon, configs/progressive_digits.py:WORD"),
        (["--config=configs"], "'configs' is a directory"),
        (["--config=README.md"], "'README.md' is no Python file"),
        (["--workdir="], "--workdir is empty"),
    ],
)
def test_the_command_line_answers_in_one_line(flags, words):
    done = python("run.py", "--config=configs/toy2d.py", *flags)
    assert done.returncode == 1
    assert re.fullmatch("error: [^\\n]*\n", done.stderr)
    assert words in done.stderr
