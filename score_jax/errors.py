"""The one exception that a user's mistake raises."""

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "nearest"]


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
