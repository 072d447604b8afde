"""Names in a config to public functions, and a config's fields to their arguments, with every mistake in one line."""

import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from score_jax.errors import UserError, nearest

__all__ = ["call", "choose", "fields", "find"]


def find(
    modules: ModuleType | tuple[ModuleType, ...], name: str, field: str, *, takes: str | tuple[str, ...]
) -> Callable:
    """A public function of a module, or of some, by its name, among those whose first arguments are named `takes`.

    Args:
      modules: where to look.
      name: what for.
      field: of the config, where the name is from.
      takes: the names of the first arguments, or several such.

    Raises:
      UserError: if there is none of that name.
    """
    modules = modules if isinstance(modules, tuple) else (modules,)

    def fits(fn: Any) -> bool:
        return ", ".join(inspect.signature(fn).parameters).startswith(takes)

    members = {n: getattr(module, n) for module in modules for n in module.__all__}
    return choose({n: fn for n, fn in members.items() if fits(fn)}, name, field)


def choose(options: dict[str, Any], name: str, field: str) -> Any:
    """An option by its name."""
    if name not in options:
        raise UserError(f"{field}: unknown name {name!r}{nearest(name, options)}")
    return options[name]


def call(fn: Callable, *args: Any, field: str, **kwargs: Any) -> Any:
    """Call with a config's fields as keyword arguments; a mistake in them is a `UserError`."""
    parameters = inspect.signature(fn).parameters
    known = list(parameters)[len(args) :]
    for name, value in kwargs.items():
        if name not in known:
            raise UserError(f"{field}: {fn.__name__} has no parameter {name!r}{nearest(name, known)}")
        _check_kind(f"{field}.{name}", value, parameters[name])
    try:
        return fn(*args, **kwargs)
    except ValueError as error:
        raise UserError(f"{field}: {error}") from error


# What plain values are, in words; a bool is an int to Python, too, and so comes first.
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a word", tuple: "a tuple"}


def _check_kind(field: str, value: Any, parameter: inspect.Parameter) -> None:
    """Raise a `UserError` at a plain value of another kind than the parameter's default, or else its annotation."""
    default = parameter.default
    wanted = parameter.annotation if default is parameter.empty else type(default)
    if wanted not in KINDS:
        return
    given = type(value)
    if given is not wanted and (given, wanted) not in ((int, float), (list, tuple)):
        if value is None or given in (*KINDS, list, dict):
            say = "" if default is parameter.empty else f", {default!r} say"
            raise UserError(f"{field} must be {KINDS[wanted]}{say}, got {value!r}")
    elif given is float and not math.isfinite(value) and value != default:
        raise UserError(f"{field} must be a finite number, got {value!r}")


def fields(config: ConfigDict) -> dict[str, Any]:
    """The arguments that a config gives to what it names."""
    return {k: v for k, v in config.to_dict().items() if k != "name"}
