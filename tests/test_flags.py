"""What a user types: the flags of `run.py` and the examples, their values, and the words that come back."""

import functools
import math
import re
import subprocess
import sys

import jax
import pytest
import yaml
from test_experiment import ROOT, get_config, tiny

from configs.base import FIELDS
from score_jax import experiment, schema
from score_jax.errors import UserError


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


NUMBERS = [name for name, (default, _) in FIELDS.items() if type(default) in (int, float)] + ["sampling.step_size"]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_cannot_be_right_is_named_with_its_bounds(name):
    """Every number of a config has bounds; what lies outside, NaN and other kinds are told before any work."""
    config = get_config("vp_digits")
    *parts, last = name.split(".")
    node = functools.reduce(getattr, parts, config)
    schema.check_numbers(config)
    for value in (math.nan, -(10**9), "abc", True, *([2**32] if name == "seed" else [])):
        with node.ignore_type():
            node[last] = value
        with pytest.raises(UserError, match=rf"^config\.{re.escape(name)} must be [^\n]*, got [^\n]*$"):
            schema.check_numbers(config)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sde.beta_max": math.nan}, r"config\.sde\.beta_max must be a finite number, got nan"),
        ({"sde.beta_max": math.inf}, r"config\.sde\.beta_max must be a finite number, got inf"),
        ({"sampling.t_min": 2.0}, r"config\.sampling\.t_min: VP needs 0 < t_min < t_max, got t_min=2"),
        ({"network.features": 0}, r"config\.network: UNet needs features of at least 1, got 0"),
        ({"network.multipliers": (1, 0)}, r"config\.network: UNet needs multipliers of at least 1, got \(1, 0\)"),
        ({"network.multipliers": ("two",)}, r"config\.network: UNet needs multipliers of at least 1, got \('two',\)"),
        ({"network.dtype": "float64"}, r"config\.network: unknown dtype 'float64'; there are float32, bfloat16"),
        ({"network.dtype": "float16"}, r"config\.network\.dtype: a CPU does not compute in 'float16': take 'bfloat16'"),
        ({"data.dir": "s3://bucket"}, r"config\.data\.dir: 's3://bucket' is no path of this machine: mount it"),
    ],
)
def test_a_value_that_cannot_be_right_is_told(fields, words, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    config = tiny()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=rf"^{words}[^\n]*$"):
        experiment.run(config, "sample", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(name="ddim", eta=math.nan), r"sampler\.eta must be a finite number, got nan"),
        (dict(name="dpm_solver_pp", order=2.5), r"sampler\.order must be a whole number, 2 say, got 2\.5"),
        (dict(name="dpm_solver_pp", order=None), r"sampler\.order must be a whole number, 2 say, got None"),
        (dict(name="dpm_solver_pp", corrector=1), r"sampler\.corrector must be True or False, False say, got 1"),
        (dict(name="langevin_corrector", snr=-1.0), "sampler: a Langevin corrector needs snr >= 0"),
        (dict(name="langevin_corrector", num_steps=-1), "sampler: a Langevin corrector needs .* num_steps >= 0"),
    ],
)
def test_an_argument_of_another_kind_is_told(arguments, words):
    config = get_config("vp_digits")
    config.sampling.sampler = arguments
    with pytest.raises(UserError, match=rf"^config\.sampling\.{words}[^\n]*$"):
        experiment.make_sampler(config, experiment.make_sde(config), lambda x, t: -x)


def test_infinity_is_a_number_where_it_has_a_meaning():
    config = get_config("vp_digits")
    config.training.grad_clip = math.inf
    schema.check_numbers(config)
    config.sampling.sampler = dict(name="stochastic_heun", noise_max=math.inf)
    experiment.make_sampler(config, experiment.make_sde(config), lambda x, t: -x)


def test_the_home_directory_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = get_config("vp_digits")
    for name in schema.PATHS:
        config.update_from_flattened_dict({name: "~/a b"})
    config = schema.expanded(config)
    for name in schema.PATHS:
        assert functools.reduce(getattr, name.split("."), config) == f"{tmp_path}/a b"
    with pytest.raises(UserError, match=r"--pretrained: there is no .*/file"):
        experiment.run(tiny(), "sample", "~/run", pretrained="~/file")
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}/run has no checkpoint"):
        experiment.run(tiny(), "sample", "~/run")


@pytest.mark.parametrize("place", ["gs://bucket/run", "~nobody_of_that_name/run", "link", "link/run", "a" * 300])
def test_a_workdir_that_cannot_be_is_told(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("nothing")
    words = "mount it|there is no such home|link is a link to nothing|File name too long"
    with pytest.raises(UserError, match=rf"^[^\n]*({words})[^\n]*$"):
        experiment.run(tiny(), "sample", place)
    assert {path.name for path in tmp_path.iterdir()} <= {"link", ".compilation_cache"}


EXAMPLES = sorted(p.stem for p in (ROOT / "examples").glob("*.py") if p.stem != "picture")


HELP_OF_ALL = """
import runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(f"examples.{name}", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0
"""


def test_examples_print_help_and_write_nothing():
    before = {path: path.stat().st_mtime for path in (ROOT / "examples").glob("*.png")}
    done = python("-c", HELP_OF_ALL, *EXAMPLES)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("--output") >= len(EXAMPLES) > 3
    done = python("-m", "examples.annealing", "--bogus")
    assert (done.returncode, done.stdout) == (2, "")
    assert {path: path.stat().st_mtime for path in (ROOT / "examples").glob("*.png")} == before


def test_a_config_of_ones_own(tmp_path):
    """With dataclasses, a field that only its owner reads, sections with fewer fields, and None for nothing."""
    (tmp_path / "mine.py").write_text("""
from __future__ import annotations
import dataclasses
from configs.base import base

@dataclasses.dataclass
class Options:
    features: int = 16

def get_config(*words):
    config = base()
    config.sde = dict(name="VP")
    config.network = dict(name="MLP", features=Options().features)
    config.sampling.guidance = dict(name="", scale=2.0)
    config.mesh = dict(data=1)
    config.data.dir = config.data.image_size = None
    config.notes = "mine"
    return config
""")
    command = [sys.executable, "run.py", f"--config={tmp_path / 'mine.py'}", "--mode=sample", f"--workdir={tmp_path}/w"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"error: {tmp_path}/w has no checkpoint: train first" in done.stderr
