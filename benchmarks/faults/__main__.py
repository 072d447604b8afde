"""Prints the count of every verdict, part by part, and each input that failed; exits with 1 if one did."""

import argparse
import collections
import importlib
import pkgutil
import sys

from benchmarks import faults

PARTS = sorted(m.name for m in pkgutil.iter_modules(faults.__path__) if not m.name.startswith("_"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=faults.__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all unless told", metavar="part")
    parser.add_argument("--verbose", action="store_true", help="show every trial")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)!r}: there are {', '.join(PARTS)}")
    failed = False
    for part in arguments.parts or PARTS:
        counts: collections.Counter[str] = collections.Counter()
        for trial in importlib.import_module(f"benchmarks.faults.{part}").trials():
            counts[trial.verdict] += 1
            bad = trial.verdict not in faults.PASSED
            failed |= bad
            if bad or arguments.verbose:
                print(f"  {part}: {trial.name}: {trial.verdict} {trial.detail}", flush=True)
        told = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        print(f"{part}: {counts.total()} inputs: {told}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
