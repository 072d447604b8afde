"""What a person looks at: grids of samples, and one self-contained page about a run."""

import base64
import html
import io
import json
import math
import pathlib
import re
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from score_jax import disk, log, provenance

__all__ = ["image_grid", "save_picture", "save_png", "side_by_side", "write_report"]

MADE = "made by"  # The text of a PNG that tells what made it.

TABLES = "evaluation", "likelihood", "accuracy", "restore", "inpaint", "colorize"

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.6em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; }
td, th { padding: .2em 1em .2em 0; text-align: left; border-bottom: 1px solid #eee; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } img.grid { image-rendering: pixelated; min-width: 24em; }
pre { background: #f6f6f6; padding: 1em; overflow: auto; font-size: 13px; }
"""


def image_grid(images: np.ndarray, *, most: int = 256, padding: int = 1) -> Image.Image:
    """uint8 images `[n, h, w, c]` as a picture, as square as may be, of the first `most`; small ones enlarged."""
    images = images[:most]
    n, h, w, c = images.shape
    columns = math.ceil(math.sqrt(n * h / w))
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (h + padding) + padding, columns * (w + padding) + padding, c), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (h + padding) + padding, (i % columns) * (w + padding) + padding
        canvas[top : top + h, left : left + w] = image
    picture = Image.fromarray(canvas.squeeze(-1) if c == 1 else canvas)
    zoom = max(1, 800 // max(picture.size))
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def side_by_side(images: dict[str, np.ndarray], *, most: int = 96) -> Image.Image:
    """A picture of uint8 images `[n, h, w, c]` by name: the first of each together, then the second, up to `most`."""
    parts = list(images.values())
    line = np.full_like(parts[0][:, :, :1], 255)
    rows = np.concatenate([a for part in parts for a in (part, line)][:-1], axis=2)
    grid = image_grid(rows, most=most, padding=1 + parts[0].shape[2] // 4)
    picture = Image.new(grid.mode, (grid.width, grid.height + 20), "white")
    picture.paste(grid, (0, 20))
    ImageDraw.Draw(picture).text((8, 5), ", ".join(images), fill="black")
    return picture


def save_png(file: BinaryIO, picture: Image.Image, *, made: str) -> None:
    """Write a picture, which holds as text, JSON, what made it."""
    text = PngInfo()
    text.add_text(MADE, made)
    picture.save(file, format="png", pnginfo=text)


def save_picture(file: BinaryIO, samples: np.ndarray, *, made: str) -> None:
    """A PNG of samples: a grid of uint8 images, or a scatter plot of the first two coordinates of vectors."""
    if samples.ndim == 4:
        save_png(file, image_grid(samples), made=made)
        return
    figure, axes = _axes(5, 5)
    axes.scatter(samples[:, 0], samples[:, 1], s=2)
    axes.set_aspect("equal")
    figure.savefig(file, dpi=100, format="png", metadata={MADE: made})


def _axes(width: float, height: float) -> tuple[Any, Any]:
    # The object interface, not pyplot: nothing global, and no display is needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _curve(rows: list[dict[str, Any]], name: str) -> str:
    figure, axes = _axes(8, 3)
    points = [(row["step"], row[name]) for row in rows if name in row]
    axes.plot(*zip(*points, strict=True), lw=1)
    if name == "loss":  # Of the steps between two points the mean and, where a spike shows, the largest.
        points = [(row["step"], row["loss_max"]) for row in rows if "loss_max" in row]
        axes.plot(*zip(*points, strict=True), lw=0.5, color="tab:orange", label="the largest")
        axes.legend(frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel(name.replace("_", " "))
    if name == "loss" and all(value > 0 for _, value in points):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue().decode()
    return svg[svg.index("<svg") :]


def _evaluation_table(evaluation: dict[str, dict[str, float]]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td>"
        f"<td class=number>{row['generated']:.4g}</td><td class=number>{row['real']:.4g}</td></tr>"
        for name, row in evaluation.items()
    )
    return f"<table><tr><th></th><th>generated</th><th>real against real</th></tr>{cells}</table>"


def _numbers_table(numbers: dict[str, float]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td class=number>{value:.4g}</td></tr>"
        for name, value in numbers.items()
    )
    return f"<table>{cells}</table>"


def _pictures(directory: pathlib.Path) -> list[pathlib.Path]:
    """The three newest pictures of samples, and the newest of every other mode and of every other sampler."""
    groups: dict[str, list[tuple[int, pathlib.Path]]] = {"step": []}
    for path in sorted(directory.glob("*.png")):
        if found := re.fullmatch(r"([a-z]+)_(\d+)(_\w+_[0-9a-f]{6})?", path.stem):  # Others may lie there.
            groups.setdefault(found[1] + (found[3] or ""), []).append((int(found[2]), path))
    newest = {name: sorted(group, reverse=True)[: 3 if name == "step" else 1] for name, group in groups.items()}
    return [path for group in newest.values() for _, path in group]


def _section(title: str, body: str, made: str | bytes = "") -> str:
    caption = html.escape(provenance.caption(json.loads(made))) if made else ""
    return f"<h2>{html.escape(title)}</h2>{caption and f'<p>{caption}</p>'}{body}"


def _picture(path: pathlib.Path) -> str:
    with Image.open(path) as image:
        image.load()
        made = image.info.get(MADE, "")
    kind, step = path.stem.split("_")[:2]
    data = base64.b64encode(path.read_bytes()).decode()
    title = "Samples" if kind == "step" else kind.capitalize()
    return _section(f"{title}, step {step}", f'<img class=grid src="data:image/png;base64,{data}">', made)


def _table(path: pathlib.Path) -> str:
    make = _evaluation_table if path.stem == "evaluation" else _numbers_table
    made = path.with_suffix(".made.json")
    return _section(path.stem.capitalize(), make(disk.read_json(path)), made.read_bytes() if made.exists() else "")


def _metrics(path: pathlib.Path) -> str:
    rows, damaged = log.read_metrics(path)
    if damaged:
        print(f"{path}: {damaged} damaged lines are left out of the report")
    if not rows:
        return ""
    last = rows[-1]
    numbers = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in last.items() if k != "step")
    drawn = {name: None for row in rows for name in row if name not in ("step", "loss_max", "skipped")}
    if any(row.get("skipped") for row in rows):
        drawn["skipped"] = None
    curves = "".join(_curve(rows, name) for name in drawn)
    return f"<p>Step {last['step']:,}: {html.escape(numbers)}.</p><h2>Training</h2>{curves}"


def _changes(path: pathlib.Path) -> str:
    """What training went on with instead, change by change."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [
        f"From step {row.pop('step'):,} on: {', '.join(f'{n} {new}, before {old}' for n, (old, new) in row.items())}."
        for row in rows
    ]
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Write `workdir/report.html` from the metrics, pictures, tables and config that lie in `workdir`.

    What is damaged is left out, and that is printed.
    """
    parts = [f"<h1>{html.escape(workdir.absolute().name)}</h1>", _metrics(workdir / "metrics.jsonl")]
    sources = [(_table, workdir / f"{name}.json") for name in TABLES]
    sources += [(_picture, path) for path in _pictures(workdir / "samples")]
    sources += [(_changes, workdir / "changes.jsonl")]
    for make, path in sources:
        if not path.exists():
            continue
        try:
            parts.append(make(path))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, SyntaxError) as error:
            # Of many kinds: any JSON may lie there; Pillow raises a SyntaxError for a broken PNG.
            print(f"{path} is left out of the report, as it is damaged: {type(error).__name__}: {error}")
    parts.append(_section("Config", f"<pre>{html.escape((workdir / 'config.yaml').read_text())}</pre>"))
    page = workdir / "report.html"
    disk.replace(
        page,
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(workdir.name)}</title>"
        f"<style>{STYLE}</style>{''.join(parts)}</html>\n",
    )
    return page
