"""The layers of the house: imports run downwards only, and files and functions stay short."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "score_jax"
FILES = sorted(ROOT.rglob("*.py"))
EDGE = {
    "experiment",
    "train",
    "evaluate",
    "metrics",
    "data",
    "checkpoint",
    "report",
    "workdir",
    "errors",
    "lookup",
    "build",
    "objective",
    "context",
    "edit",
    "adopt",
    "features",
    "sharding",
    "files",
    "images",
    "prepare",
    "schema",
    "processes",
    "disk",
    "log",
    "sample_files",
    "provenance",
}
# What a module of the core may import besides; `import score_jax` does not wait for it.
EXTRA = {"score_jax.ode": {"diffrax"}, "score_jax.mcmc": {"blackjax"}, "score_jax": {"importlib"}}


def layer(module):
    """0 for the core, 1 for networks, 2 for the edge."""
    part = module.split(".")[1] if "." in module else module
    return 1 if part in {"networks", "pickles", "pretrained", "pytorch", "tensors"} else 2 if part in EDGE else 0


def module_name(path):
    return ".".join(["score_jax", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                f"{node.module}.{a.name}" if node.module == "score_jax" else str(node.module) for a in node.names
            )


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_downwards(path):
    own = layer(module_name(path))
    names = list(imports(path))
    inner = [n for n in names if n.startswith("score_jax.")]
    assert [n for n in inner if layer(n) > own] == []
    allowed = {0: {"jax", "numpy"} | EXTRA.get(module_name(path), set()), 1: {"jax", "numpy", "flax"}}.get(own)
    standard = {"collections", "dataclasses", "functools", "math", "re", "typing"}
    if own == 1:
        standard |= {"itertools", "json", "mmap", "msgpack", "os", "pathlib", "pickletools", "reprlib", "zipfile"}
    if allowed is not None:
        outer = {n.split(".")[0] for n in names if not n.startswith("score_jax")}
        assert outer <= allowed | standard
    assert module_name(path) != "score_jax" or EXTRA.keys().isdisjoint(names)
    assert "tensorflow" not in {n.split(".")[0] for n in names}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 330
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 45, f"{node.name} has {length} lines"
