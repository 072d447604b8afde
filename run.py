"""Train, sample and evaluate: python run.py --config=configs/vp_digits.py [--mode=train] [--config.a.b=value]."""

import functools
import operator
import pathlib
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The experiment, a file of configs/.",
    lock_config=False,  # See `check_fields`.
    accept_new_attributes=True,
)
MODE = flags.DEFINE_string(
    "mode",
    "train",
    "What to do: train, sample, evaluate, likelihood, inpaint, colorize, restore, interpolate or export.",
)
PRETRAINED = flags.DEFINE_string(
    "pretrained", "", "A published checkpoint to start from: a file, or a directory of diffusers."
)
RETUNE = flags.DEFINE_bool(
    "retune", False, "Let training go on with another learning_rate, warmup_steps, grad_clip or decay; it is recorded."
)
WORKDIR = flags.DEFINE_string("workdir", None, "The directory of the run; runs/<config name> unless told.")


# Parts of a config that give arguments to what they name, of which a file need not list all, by mode; none of them
# changes what a run has learned.
NAMED = {"sampling.sampler", "sampling.corrector", "sampling.guidance"}
RESTORE = NAMED | {"editing.operator", "editing.method"}


def check_fields() -> None:
    """Raise a `KeyError` at a flag for a field that the file lacks, but for arguments, which are checked where used."""
    file = flags.FlagValues()
    alone = ["run.py", f"--config={config_flags.get_config_filename(flags.FLAGS['config'])}"]
    config_flags.DEFINE_config_file("config", None, "", flag_values=file, sys_argv=alone)
    file(alone)
    for path in config_flags.get_override_values(flags.FLAGS["config"]):
        if path.rpartition(".")[0] not in (RESTORE if MODE.value == "restore" else NAMED):
            functools.reduce(operator.getitem, path.split("."), file.config)
    CONFIG.value.lock()


def parse(argv: list[str]) -> list[str]:
    """The flags, or one line about the mistake in them."""
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is None:
            sys.exit("error: --config is missing: name an experiment, --config=configs/vp_digits.py say")
        check_fields()
    except flags.Error as error:
        # What the experiment says of the word behind a colon, `configs/vp_cifar.py:ncsnpp`, comes with a traceback.
        last = str(error).strip().splitlines()[-1]
        told = last.startswith(("ValueError: ", "TypeError: get_config()"))
        sys.exit(f"error: --config: {last.partition(': ')[2]}" if told else f"error: {error}")
    except OSError as error:
        sys.exit(f"error: --config: {error.strerror or ' '.join(str(error).split())}")
    except (AttributeError, KeyError) as error:  # A field that the config lacks.
        found = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(error))
        detail = f"{found[2]!r}; did you mean {found[1]!r}?" if found else error.args[0]
        sys.exit(f"error: --config has no field {detail}")
    if rest[1:]:
        sys.exit(f"error: unexpected argument {rest[1]!r}: flags are written --name=value")
    return rest


def main(_: list[str]) -> None:
    from score_jax import experiment  # Here, so that a typo in a flag is answered at once.
    from score_jax.errors import UserError

    logging.set_verbosity(logging.WARNING)  # Orbax tells every rename.
    path, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    name = "_".join([pathlib.Path(path).stem, *filter(None, [argument])])
    try:
        given = config_flags.get_override_values(flags.FLAGS["config"])
        workdir = WORKDIR.value or f"runs/{name}"
        options = dict(pretrained=PRETRAINED.value, given=given, retune=RETUNE.value)
        experiment.run(CONFIG.value, MODE.value, workdir, **options)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
