"""Train, sample and evaluate: python run.py --config=configs/vp_digits.py [--mode=train] [--config.a.b=value]."""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # What Ctrl-C does until `main` knows better: the imports take a while.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

import difflib
import importlib.util
import inspect
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs.base import CHOSEN, FIELDS, base

MODE = flags.DEFINE_string("mode", "train", "What to do: train, sample, evaluate, ..., see below.")
WORKDIR = flags.DEFINE_string("workdir", None, "The directory of the run; runs/<config name> unless told.")
PRETRAINED = flags.DEFINE_string(
    "pretrained", "", "A published checkpoint to start from: a file, or a directory of diffusers."
)
RETUNE = flags.DEFINE_bool(
    "retune", False, "Let training go on with another learning_rate, warmup_steps, grad_clip or decay; it is recorded."
)

MODES = {
    "train": "train, and go on where a run was stopped; samples in the end",
    "sample": "samples of the newest checkpoint",
    "evaluate": "metrics of samples, beside those of real images; the accuracy of a classifier",
    "likelihood": "the likelihood of test images, in bits per dimension",
    "inpaint": "hide a part of images and fill it in",
    "colorize": "take the color from images and give it back",
    "restore": "blur images or the like, add noise, and restore them",
    "interpolate": "walk from one image to another",
    "export": "the network as a directory of diffusers",
}

# Parts of a config that give arguments to what they name, of which a file need not list all, by mode; none of them
# changes what a run has learned.
NAMED = {"sampling.sampler", "sampling.corrector", "sampling.guidance"}
RESTORE = NAMED | {"editing.operator", "editing.method"}
OPEN = RESTORE | {"sde", "network", "parameterization"}  # Those of a file, whatever the mode.

# absl's own would list the flags of every library.
HELP = re.compile(r"--?(h|\?|help|helpshort|helpfull)(=.*)?")


def load(path: str, word: list[str]) -> ConfigDict:
    """What a config file returns, given what stands behind a colon; every mistake in it ends with one line."""
    if not (file := pathlib.Path(path)).is_file() or file.suffix != ".py":
        wrong = "is a directory" if file.is_dir() else "is no Python file" if file.exists() else "does not exist"
        sys.exit(f"error: --config: {path!r} {wrong}: name an experiment, --config=configs/vp_digits.py say")
    spec = importlib.util.spec_from_file_location("config_of_this_run", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # Dataclasses look there.
    try:
        spec.loader.exec_module(module)
        if not callable(get_config := getattr(module, "get_config", None)):
            sys.exit(f"error: --config: {path} has no function get_config, which returns the experiment")
        parameters = inspect.signature(get_config).parameters.values()
        more = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        least = sum(p.default is p.empty for p in places)
        if not least <= len(word) <= (len(places) or more):
            wanted = f"needs a word behind a colon, {path}:WORD" if least else "takes no word behind a colon"
            sys.exit(f"error: --config: {path} {wanted}: {inspect.getdoc(module) or 'see there'}".splitlines()[0])
        config = get_config(*word)
    except Exception as error:  # Whatever a person's file raises.
        frames, own = traceback.extract_tb(error.__traceback__), str(file.absolute())
        lines = [frame.lineno for frame in frames if frame.filename == own]
        line = f" (line {lines[-1]} of {path})" if lines else f" ({path})"
        what = "" if type(error) is ValueError else f"{type(error).__name__}: "
        sys.exit(f"error: --config: {what}{' '.join(str(error).split())}{line if what[:6] != 'Syntax' else ''}")
    if not isinstance(config, ConfigDict):
        sys.exit(f"error: --config: get_config of {path} returns a {type(config).__name__}, and not a ConfigDict")
    check_names(path, config)
    return config


def check_names(path: str, config: ConfigDict) -> None:
    """End if a file lacks a field, but for arguments, or has one that is nearly another's name."""
    known, names = FIELDS.keys() | CHOSEN.keys(), dict(flat(config.to_dict()))
    arguments = tuple(f"{part}." for part in (*OPEN, "mesh", "distributed"))
    for name in (*FIELDS, *CHOSEN):
        if name not in names and (name.endswith(".name") or not name.startswith(arguments)):
            sys.exit(f"error: --config: {path} has no config.{name}: begin with configs.base.base()")
    for name in names.keys() - known:  # People keep fields of their own there.
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if near and not name.startswith(arguments):
            sys.exit(f"error: --config: {path} sets config.{name}, which is no field; did you mean {near[0]!r}?")


def flat(node: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a config by their paths."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{name}.")
        else:
            yield above + name, value


def check_fields(argv: list[str], file: ConfigDict, mode: str) -> None:
    """End at a flag for a field that the file lacks, but for arguments, which are checked where they are used."""
    for flag in argv:
        if not (found := re.match(r"--?(?:no)?config\.([^=]*)", flag)):
            continue
        *parts, last = found[1].split(".")
        node, taken = file, RESTORE if mode == "restore" else NAMED
        for part in parts if ".".join(parts) in taken else [*parts, last]:
            if not isinstance(node, ConfigDict):
                sys.exit(f"error: {flag}: a value, {node!r}, has no field {part!r}")
            if part not in node:
                from score_jax.errors import nearest

                sys.exit(f"error: {flag}: --config has no field {part!r}{nearest(part, node)}")
            node = node[part]
        if not last.isidentifier():
            sys.exit(f"error: {flag}: {last!r} is no name of a field")


def parse(argv: list[str]) -> list[str]:
    """The flags, or one line about the mistake in them."""
    asked = [flag for flag in argv[1:] if HELP.fullmatch(flag)]
    argv = [flag for flag in argv if flag not in asked]
    alone = flags.FlagValues()  # The file comes first: the other flags are about what is in it.
    path, mode = (flags.DEFINE_string(name, "", "", flag_values=alone) for name in ("config", "mode"))
    alone.set_gnu_getopt()
    try:
        argv = alone.read_flags_from_files(argv, force_gnu=False)
        alone(argv, known_only=True)
        if path.value:
            name, *word = path.value.split(":", 1)
            check_fields(argv, load(name, word), mode.value)
        elif not asked:
            sys.exit("error: --config is missing: name an experiment, --config=configs/vp_digits.py say")
        config_flags.DEFINE_config_file(
            "config",
            None,
            "The experiment, a file of configs/, for some with a word, configs/vp_cifar.py:ncsnpp.",
            lock_config=False,  # `check_fields` has seen to it.
            accept_new_attributes=True,
            sys_argv=argv,
        )
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    if rest[1:]:
        sys.exit(f"error: unexpected argument {rest[1]!r}: flags are written --name=value")
    if asked:
        print_help(flags.FLAGS.config)
        sys.exit()
    flags.FLAGS.config.lock()
    return rest


def print_help(config: ConfigDict | None) -> None:
    """All flags, modes and fields: those of the config, or those of every one."""

    def table(rows: Iterable[tuple[str, str]], width: int) -> None:
        for name, words in rows:
            first, *others = textwrap.wrap(words, 117 - width)
            print(f"  {name:{width}} {first}" if len(name) <= width else f"  {name}\n{'':{width + 3}}{first}")
            for line in others:
                print(f"{'':{width + 3}}{line}")

    words = {name: words for name, (_, words) in FIELDS.items()} | CHOSEN
    values = dict(flat((config or base()).to_dict()))

    def fields() -> Iterator[tuple[str, str]]:
        for name in (*words, *sorted(values.keys() - words.keys())):
            owner = values.get(f"{name.rpartition('.')[0]}.name")
            yield f"{name}={values[name]!r}" if name in values else name, words.get(name, f"of {owner}")

    print(__doc__.strip(), "\n\nFlags:", sep="")
    own = "config", *(flag.name for flag in (MODE, WORKDIR, PRETRAINED, RETUNE))
    table(((f"--{name}", flags.FLAGS[name].help) for name in own), 13)
    print("\nModes:")
    table(MODES.items(), 13)
    print("\nFields, set by --config.NAME=VALUE behind --config:")
    table(fields(), 43)


def main(_: list[str]) -> None:
    from score_jax import experiment, processes  # Here, so that a typo in a flag is answered at once.
    from score_jax.errors import UserError

    processes.listen()
    logging.set_verbosity(logging.WARNING)  # Orbax tells every rename.
    config = flags.FLAGS["config"]
    path, _, argument = config_flags.get_config_filename(config).partition(":")
    name = "_".join([pathlib.Path(path).stem, *filter(None, [argument])])
    try:
        given = config_flags.get_override_values(config)
        workdir = f"runs/{name}" if WORKDIR.value is None else WORKDIR.value
        options = dict(pretrained=PRETRAINED.value, given=given, retune=RETUNE.value)
        experiment.run(config.value, MODE.value, workdir, **options)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
