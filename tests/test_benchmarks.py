"""The committed table is whole, and ratios that are quick to measure are within a factor of 2 of it."""

import json
import pathlib

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import sampling, subjects, training

HERE = pathlib.Path(benchmarks.__file__).parent
COMMITTED = json.loads((HERE / "benchmarks.json").read_text())


@pytest.fixture(scope="module")
def digits():
    return subjects.SUBJECTS[subjects.DIGITS_UNET]


def test_the_table_has_all_its_sections():
    assert COMMITTED.keys() == {"machine", "solvers", *benchmarks.TITLES}
    assert COMMITTED["networks"].keys() == subjects.SUBJECTS.keys()
    assert (HERE.parent / COMMITTED["solvers"]).exists()
    assert (HERE / "benchmarks.md").read_text() == benchmarks.markdown(COMMITTED)


@pytest.mark.parametrize(
    ("section", "measure"),
    [
        ("sampling", lambda it: sampling.loop(it, 50, 3)),
        ("training", lambda it: training.overhead(it, 10, 3)),
    ],
)
def test_ratios_have_not_doubled(digits, section, measure):
    committed = COMMITTED[section][subjects.DIGITS_UNET]
    measured = measure(digits())
    assert {name: value for name, value in measured.items() if value > 2 * committed[name]} == {}
