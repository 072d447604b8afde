"""The one exception that a user's mistake raises, and how its line is put."""

import difflib
import reprlib
from collections.abc import Iterable

__all__ = ["UserError", "nearest", "one_line", "short"]


class UserError(ValueError):
    """Bad input from a person: `run.py` prints its one line and no traceback."""


def nearest(name: str, names: Iterable[str], *, listed: Iterable[str] = ()) -> str:
    """`; did you mean 'X'?` for the nearest of some names, or those of `listed`, which are 12 unless told."""
    names = list(names)
    folded = {n.lower(): n for n in names}
    close = difflib.get_close_matches(str(name).lower(), folded, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {folded[close[0]]!r}?"
    return f"; there are {', '.join(listed or sorted(names)[:12])}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlevel = 2


def short(value: object) -> str:
    """`repr`, cut to a part of a line: what a file holds may be long, or shared so often that it never ends."""
    return _SHORT.repr(value)


def one_line(error: BaseException) -> str:
    """What an exception says, in one line of at most 500 characters."""
    text = str(error) if isinstance(error, (ValueError, OSError)) and str(error) else repr(error)
    return " ".join(text[:500].split())
