"""The one exception that a user's mistake raises."""

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "nearest"]


class UserError(ValueError):
    """Bad input from a person: `run.py` prints its one line and no traceback."""


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the nearest of some names, or the list of them all."""
    names = list(names)
    folded = {n.lower(): n for n in names}
    close = difflib.get_close_matches(str(name).lower(), folded, n=1, cutoff=0.5)
    return f"; did you mean {folded[close[0]]!r}?" if close else f"; there are {', '.join(sorted(names)[:12])}"
