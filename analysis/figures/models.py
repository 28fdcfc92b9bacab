"""The recalls of an evaluation's models in both directions, with their intervals or spreads."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from onceover.analysis.drawing import CAPTION_COLOUR, IMAGE_COLOUR, NEUTRAL_COLOUR, WIDTH
from onceover.analysis.sources import RunFiles, interval_of, read_evaluation

SOURCE = "run"
ORDER = 50
_APART = 0.22  # rows between the recalls of a model, whose bars would cover each other
_MARKERS = {1: "o", 5: "s", 10: "^"}
_DIRECTIONS = (
    ("image_to_text", "Image → caption", IMAGE_COLOUR),
    ("text_to_image", "Caption → image", CAPTION_COLOUR),
)


def drawings(source: RunFiles) -> dict[str, Callable[[], Figure] | str]:
    """The recalls, once the split has been evaluated."""
    file = source.evaluation_file
    if not file.exists():
        return {"models": f"{source.folder} has no {file.name}; evaluate --split {source.split} makes it"}
    return {"models": lambda: draw_models(read_evaluation(file, source.embeddings.space))}


def draw_models(result: dict) -> Figure:
    """Draws the recalls of an evaluation, as ``retrieval.evaluation.evaluate`` gives it."""
    models = result["models"]
    figure = Figure(figsize=(WIDTH, 1.5 + 0.36 * len(models)), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (direction, name, colour) in zip(panels, _DIRECTIONS, strict=True):
        rows = [summary[direction] for summary in models.values()]
        _draw_recalls(axes, rows, colour)
        sizes = f"{rows[0]['queries']:,} queries, gallery of {rows[0]['gallery']:,}"
        axes.set(xlabel="recall in %", title=f"{name}\n{result['split']}: {sizes}")
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    panels[0].set_yticks(np.arange(len(models)), _labels(models))
    panels[0].invert_yaxis()
    end = panels[0].get_xlim()[1]
    panels[0].set_xlim(-end / 60, end)  # markers at 0 are whole
    signs = [Line2D([], [], color=NEUTRAL_COLOUR, marker=mark, label=f"R@{k}") for k, mark in _MARKERS.items()]
    figure.legend(handles=signs, title=_bars(models), loc="outside lower center", ncols=len(signs))
    return figure


def _bars(models: dict[str, dict]) -> str:
    """What the bars are, and which models have others."""
    text = "bars: 95 % intervals over images"
    random = [name for name, summary in models.items() if "R@1_sd" in summary[_DIRECTIONS[0][0]]]
    if random:
        text += f"; of {' and '.join(random)}: the standard deviation over random maps"
    return text


def _labels(models: dict[str, dict]) -> list[str]:
    """The models' names, with the galleries of those that search others than the first one does."""
    galleries = {}
    for name, summary in models.items():
        galleries[name] = [summary[direction]["gallery"] for direction, _, _ in _DIRECTIONS]
    usual = next(iter(galleries.values()))
    labels = []
    for name, sizes in galleries.items():
        label = name.replace("_transductive", "\n(transductive)")
        if sizes != usual:
            label += f"\n(galleries of {sizes[0]:,} and {sizes[1]:,})"
        labels.append(label)
    return labels


def _draw_recalls(axes: Axes, rows: list[dict], colour: str) -> None:
    """Draws a marker with a bar for each model and K; a row for each model, from 0."""
    for number, (k, marker) in enumerate(_MARKERS.items()):
        heights = np.arange(len(rows)) + _APART * (number - 1)
        name = f"R@{k}"
        recalls = np.array([numbers[name] for numbers in rows])
        low, high = np.array([interval_of(numbers, name) for numbers in rows]).T
        bars = np.maximum([recalls - low, high - recalls], 0)
        axes.errorbar(recalls, heights, xerr=bars, fmt=marker, color=colour, capsize=1.5, label=name)
