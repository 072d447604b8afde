"""README's code runs as it stands."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
WHOLE = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if block.startswith("import jax")]


@pytest.mark.parametrize("block", WHOLE, ids=lambda block: block.split("\n\n")[0].splitlines()[-1])
def test_code_that_begins_with_its_imports_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_both_are_found():
    assert len(WHOLE) == 2
