"""What a person looks at: grids of samples, and one self-contained page about a run."""

import base64
import html
import io
import json
import math
import pathlib
import re
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["image_grid", "save_picture", "side_by_side", "write_report"]

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


def save_picture(path: pathlib.Path, samples: np.ndarray) -> None:
    """A PNG of samples: a grid of uint8 images, or a scatter plot of the first two coordinates of vectors."""
    if samples.ndim == 4:
        image_grid(samples).save(path)
        return
    figure, axes = _axes(5, 5)
    axes.scatter(samples[:, 0], samples[:, 1], s=2)
    axes.set_aspect("equal")
    figure.savefig(path, dpi=100)


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
    """The three newest pictures of samples, and the newest of every other mode."""
    ours = [p for p in directory.glob("*.png") if re.fullmatch(r"[a-z]+_\d+", p.stem)]  # Of those that lie there.
    pictures = sorted(ours, key=lambda p: int(p.stem.split("_")[1]), reverse=True)
    newest: dict[str, list[pathlib.Path]] = {"step": []}
    for path in pictures:
        newest.setdefault(path.stem.split("_")[0], []).append(path)
    return [path for kind, paths in newest.items() for path in paths[: 3 if kind == "step" else 1]]


def _changes(workdir: pathlib.Path) -> list[str]:
    """What training went on with instead, change by change."""
    file = workdir / "changes.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [
        f"From step {row.pop('step'):,} on: {', '.join(f'{n} {new}, before {old}' for n, (old, new) in row.items())}."
        for row in rows
    ]


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Write `workdir/report.html` from the metrics, pictures, evaluation and config that lie in `workdir`."""
    parts = [f"<h1>{html.escape(workdir.absolute().name)}</h1>"]
    lines = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    if rows:
        last = rows[-1]
        numbers = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in last.items() if k != "step")
        parts.append(f"<p>Step {last['step']:,}: {html.escape(numbers)}.</p><h2>Training</h2>")
        drawn = {name: None for row in rows for name in row if name not in ("step", "loss_max", "skipped")}
        if any(row.get("skipped") for row in rows):
            drawn["skipped"] = None
        parts += [_curve(rows, name) for name in drawn]
    evaluation = workdir / "evaluation.json"
    if evaluation.exists():
        parts.append("<h2>Evaluation</h2>" + _evaluation_table(json.loads(evaluation.read_text())))
    for path in (workdir / f"{name}.json" for name in ("likelihood", "accuracy")):
        if path.exists():
            parts.append(f"<h2>{path.stem.capitalize()}</h2>" + _numbers_table(json.loads(path.read_text())))
    for path in _pictures(workdir / "samples"):
        kind, step = path.stem.split("_")
        data = base64.b64encode(path.read_bytes()).decode()
        title = "Samples" if kind == "step" else html.escape(kind.capitalize())
        parts.append(f'<h2>{title}, step {step}</h2><img class=grid src="data:image/png;base64,{data}">')
    parts += [f"<p>{html.escape(line)}</p>" for line in _changes(workdir)]
    parts.append(f"<h2>Config</h2><pre>{html.escape((workdir / 'config.yaml').read_text())}</pre>")
    page = workdir / "report.html"
    page.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(workdir.name)}</title>"
        f"<style>{STYLE}</style>{''.join(parts)}</html>\n"
    )
    return page
