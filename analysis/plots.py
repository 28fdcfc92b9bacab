"""Figures that could go into a paper, each as PNG and SVG, drawn from stored files alone.

Colours are two of Okabe and Ito's (blue for images, vermilion for captions), told apart by shape as well.
"""

import csv
import io
import math
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from onceover.base.errors import OnceoverError
from onceover.base.files import MAX_TEXT, read_bytes, read_record
from onceover.base.formats import EMBEDDINGS, EVALUATION, HISTORY, PROVENANCE
from onceover.base.hdf5 import StoredRows
from onceover.base.memory import default_memory
from onceover.base.outputs import Outputs
from onceover.extract.pictures import read_picture
from onceover.extract.store import KINDS, FeatureStore, row_blocks
from onceover.retrieval.embeddings import Embeddings, model_name, read_embeddings
from onceover.retrieval.metrics import Ranks, chance, rank

if TYPE_CHECKING:
    from onceover.retrieval.search import Hit, Query

PICTURE, CAPTION, NEUTRAL = "#0072B2", "#D55E00", "#7F7F7F"
SPLIT_COLOURS = {"train": "#0072B2", "dev": "#E69F00", "test": "#009E73", "": "#999999"}
MAP_PICTURES = 400  # of a split, in t-SNE and PCA; each with one caption
LINKED_PAIRS = 40
MATRIX_PICTURES = 40
QUERY_SIZE = 640  # pixels, the longer side of a query's image
FORMATS = (".png", ".svg", ".pdf")  # others that Matplotlib has need TeX, or are read by few
_SUFFIXES = (".png", ".svg")  # of each figure of a folder
_STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "text.parse_math": False,  # a dollar sign in a caption is a dollar sign
    "svg.hashsalt": "onceover",  # the same figure gives the same SVG
    "svg.fonttype": "none",
}


class PlotError(OnceoverError):
    """Files that hold nothing to draw or are damaged, or an image format that is not written."""


def plot_run(
    folder: str | Path,
    out: str | Path,
    split: str | None = None,
    seed: int = 0,
    step: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Draws a run: t-SNE and PCA of the joint embedding, a similarity matrix, training curves, rank distributions.

    Once the split has been evaluated, its models' recalls are drawn, too.

    Args:
        split: whose images are drawn; the reported split by default.
        step: receives the name of each figure before it is drawn.

    Returns:
        The files written.

    Raises:
        EmbeddingsError, PlotError: files that are missing or damaged.
    """
    folder = Path(folder)
    embeddings = read_embeddings(folder / EMBEDDINGS)
    split = split or embeddings.report_split
    drawings = {
        "tsne": lambda: draw_map(embeddings, split, "t-SNE", seed),
        "pca": lambda: draw_map(embeddings, split, "PCA", seed),
        "similarity": lambda: draw_similarity(embeddings, split, seed),
        "training": lambda: draw_training(folder),
        "ranks": lambda: draw_ranks(embeddings, split),
    }
    evaluated = folder / f"{EVALUATION.format(split)}.json"
    if evaluated.exists():
        drawings["models"] = lambda: _draw_evaluation(evaluated)
    if _members(folder / PROVENANCE) > 1:
        del drawings["training"]  # of an ensemble each member has its own
    return draw_all(drawings, Path(out), step)


def plot_store(
    store: FeatureStore, out: str | Path, memory: int | None = None, step: Callable[[str], None] = lambda _: None
) -> list[Path]:
    """Draws a store: PCA of both kinds of features by split, and how much variance how many components hold.

    ``memory``: bytes that it may take, by default half of the machine's; a sample of the rows is drawn if need be.
    """
    return draw_all({"features": lambda: draw_features(store, memory or default_memory())}, Path(out), step)


def draw_all(drawings: dict[str, Callable[[], Figure]], out: Path, step: Callable[[str], None]) -> list[Path]:
    """Draws figures, by name, in the project's style, each as PNG and SVG; returns the files.

    Raises:
        OutputError: a file of one of their names is somebody else's; nothing is drawn then.
    """
    outputs = Outputs(out, "name another folder for the figures")
    written = []
    with outputs.writing(f"{name}{suffix}" for name in drawings for suffix in _SUFFIXES):
        for name, draw in drawings.items():
            step(name)
            with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "constrained_layout not applied")  # of labels longer than the figure
                figure = draw()
                written += [_save(figure, outputs, f"{name}{suffix}") for suffix in _SUFFIXES]
    return written


def check_figure(path: str | Path) -> None:
    """Refuses a file that could not be drawn to, before the work for it is done.

    Raises:
        PlotError: the suffix names no format that is written. OutputError: a file of somebody else's is there.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise PlotError(f"{path} names no image format; use .png, .svg or .pdf")
    _beside(path).check(path.name)


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a figure whole or not at all, and never over a file of somebody else's.

    Raises:
        PlotError: the suffix names no format that is written. OutputError: a file of somebody else's is there.
    """
    check_figure(path)
    with _beside(path).writing([path.name]):
        return _save(figure, _beside(path), path.name)


def _beside(path: Path) -> Outputs:
    return Outputs(path.parent, "name another file for the figure")


def _save(figure: Figure, outputs: Outputs, name: str) -> Path:
    metadata = {"Date": None} if name.lower().endswith(".svg") else None
    with outputs.file(name) as aside:
        figure.savefig(aside, bbox_inches="tight", metadata=metadata)
    return outputs.folder / name


def draw_map(embeddings: Embeddings, split: str, method: str, seed: int = 0) -> Figure:
    """Images and captions of a split in two dimensions by ``t-SNE`` or ``PCA``; some matched pairs are linked."""
    pictures, captions, chosen = _pairs(embeddings, split, MAP_PICTURES, seed)
    points = np.concatenate([embeddings.images[pictures], embeddings.texts[captions]])
    if method == "t-SNE":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, max(1.0, (len(points) - 1) / 3))
        places = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed).fit_transform(points)
        labels = ("t-SNE 1", "t-SNE 2")
    else:
        from sklearn.decomposition import PCA

        model = PCA(2, random_state=seed).fit(points)
        places = model.transform(points)
        labels = tuple(
            f"component {n + 1} ({100 * share:.0f} % of the variance)"
            for n, share in enumerate(model.explained_variance_ratio_)
        )
    image, text = np.split(places, 2)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.add_subplot()
    linked = np.random.default_rng(seed).permutation(len(pictures))[:LINKED_PAIRS]
    lines = LineCollection(
        np.stack([image[linked], text[linked]], 1),
        colors=NEUTRAL,
        linewidths=0.8,
        alpha=0.7,
        label=f"matched pair ({len(linked)} shown)",
    )
    axes.add_collection(lines)
    axes.scatter(*image.T, s=16, c=PICTURE, marker="o", linewidths=0, alpha=0.8, label="image")
    axes.scatter(*text.T, s=20, c=CAPTION, marker="^", linewidths=0, alpha=0.8, label="caption")
    axes.set(
        xlabel=labels[0],
        ylabel=labels[1],
        title=f"{method} of the joint embedding\n{split}: {len(pictures):,} of {chosen:,} images, one caption each",
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, markerscale=1.6, handletextpad=0.4)
    if method == "t-SNE":
        axes.set(xticks=[], yticks=[])
    return figure


def draw_similarity(embeddings: Embeddings, split: str, seed: int = 0) -> Figure:
    """Cosine similarities of a sample of images with one caption each; the matched pairs lie on the diagonal."""
    pictures, captions, chosen = _pairs(embeddings, split, MATRIX_PICTURES, seed)
    scores = embeddings.images[pictures] @ embeddings.texts[captions].T
    best_row = scores.argmax(1) == np.arange(len(scores))
    figure = Figure(figsize=(6.6, 5.6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(scores, cmap="cividis", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="cosine similarity", shrink=0.85)
    place = np.arange(len(scores))
    axes.scatter(place[best_row], place[best_row], s=22, facecolors="none", edgecolors="white", linewidths=1.0)
    axes.set(
        xlabel="caption",
        ylabel="image",
        title=f"Similarity of {len(pictures):,} of the {chosen:,} images of {split}\nto one caption of each; "
        f"circles: the own one scores best ({best_row.sum()})",
    )
    return figure


def draw_training(folder: Path) -> Figure:
    """A run's loss epoch by epoch, and its recalls on the selection split whenever they were measured."""
    split, pictures, best = _chosen_on(folder / PROVENANCE)
    epoch, columns = _read_history(folder / HISTORY)
    measured = np.isfinite(columns["rsum"])
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epoch, columns["loss"], color="black", marker=".")
    left.set(xlabel="epoch", ylabel="training loss", title="Loss")
    for direction, colour, label in (
        ("image_to_text", PICTURE, "image → caption"),
        ("text_to_image", CAPTION, "caption → image"),
    ):
        for k, style in ((1, "-"), (5, "--"), (10, ":")):
            recall = columns[f"{direction}_R@{k}"][measured]
            right.plot(epoch[measured], recall, color=colour, linestyle=style, marker=".", label=f"{label}, R@{k}")
    right.set(
        xlabel="epoch",
        ylabel="recall in %",
        title=f"Recall on {split}, {pictures:,} images",
        ylim=(0, None),
    )
    for axes in (left, right):
        axes.axvline(best, color=NEUTRAL, linewidth=0.8, label=f"best epoch: {best}")
        axes.xaxis.get_major_locator().set_params(integer=True)
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _members(file: Path) -> int:
    """How many pairs of heads a run has."""
    members = read_record(file, "the run's provenance", strict=False).get("members")
    if not isinstance(members, list):
        raise PlotError(f"{file} is damaged, or of another version; fit again")
    return len(members)


def _chosen_on(file: Path) -> tuple[str, int, int]:
    """The split that chose a run's epoch, how many images it has, and the epoch.

    Raises:
        PlotError: a damaged ``run.json``.
    """
    run = read_record(file, "the run's provenance", strict=False)
    try:
        selection, (best,) = run["selection"], run["best_epochs"]
        split, pictures = selection["split"], selection["pictures"]
    except (KeyError, TypeError, ValueError) as error:
        raise PlotError(f"{file} is damaged, or of another version; fit again") from error
    if not isinstance(split, str) or type(pictures) is not int or type(best) is not int:
        raise PlotError(f"{file} is damaged, or of another version; fit again")
    return split, pictures, best


def _read_history(file: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A run's history: epochs, and columns of numbers, NaN where something was not measured.

    Raises:
        PlotError: missing, or damaged.
    """
    recalls = [f"{direction}_R@{k}" for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    try:
        rows = read_table(file)
        epoch = np.array([number_of(row["epoch"], 1, 10**9) for row in rows])
        columns = {name: np.array([number_of(row[name] or "nan", -1e9, 1e9) for row in rows]) for name in recalls}
        columns["rsum"] = np.array([number_of(row["rsum"] or "nan", 0, 600) for row in rows])
        columns["loss"] = np.array([number_of(row["loss"], -1e30, 1e30) for row in rows])
    except (OSError, OnceoverError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise PlotError(f"{file} is missing or damaged; fit again") from error
    return epoch, columns


def read_table(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, as text.

    Raises:
        ValueError, csv.Error: no UTF-8, no rows, or rows longer or shorter than the header. OSError, FileError.
    """
    text = read_bytes(file, MAX_TEXT).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or any(None in row or None in row.values() for row in rows):
        raise ValueError("no rows, or rows of another length than the header")
    return rows


def number_of(text: str, least: float, most: float) -> float:
    """A number that is written as text; ``nan`` stays NaN.

    Raises:
        ValueError: no number, or one out of bounds.
    """
    value = float(text)
    if not math.isnan(value) and not least <= value <= most:
        raise ValueError(f"{value} is out of bounds")
    return value


def draw_ranks(embeddings: Embeddings, split: str) -> Figure:
    """Share of queries whose truth stands within the first K, for every K, in both directions and for chance.

    A run that searches with a correction for hubs is drawn with it.
    """
    pictures, captions, image_index = embeddings.split(split)
    biases = embeddings.biases(split=split)
    found = rank(embeddings.images[pictures], embeddings.texts[captions], image_index, **biases)
    random = chance(len(pictures), image_index)
    figure = Figure(figsize=(9.2, 4.0), layout="constrained")
    names = ("Image → caption", "Caption → image")
    for axes, model, guess, name, colour in zip(
        figure.subplots(1, 2, sharey=True), found, random, names, (PICTURE, CAPTION), strict=True
    ):
        cutoffs = np.unique(np.geomspace(1, model.gallery, 60).astype(int))
        axes.plot(cutoffs, _hit_curve(model, cutoffs), color=colour, label=model_name(embeddings.rerank))
        axes.plot(cutoffs, _hit_curve(guess, cutoffs), color=NEUTRAL, linestyle="--", label="chance")
        median = float(np.median(model.expected_rank()))
        axes.axvline(median, color=colour, linewidth=0.8, linestyle=":", label=f"median rank {median:g}")
        axes.set(
            xscale="log",
            xlim=(1, model.gallery),
            ylim=(0, 100),
            xlabel="K",
            title=f"{name}\n{split}: {len(model.greater):,} queries, gallery of {model.gallery:,}",
        )
        _plain_ticks(axes)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, columnspacing=1)
    figure.axes[0].set_ylabel("queries with a correct item\namong the first K, in %")
    return figure


def _draw_evaluation(file: Path) -> Figure:
    result = read_record(file, "the evaluation", strict=False)
    try:
        check_evaluation(result)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlotError(f"{file} is damaged, or of another version; evaluate again") from error
    return draw_models(result)


def check_evaluation(result: dict) -> None:
    """Refuses what is no evaluation, or one without what is drawn of it.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: of the first thing that is wrong.
    """
    if not isinstance(result["split"], str) or not result["models"]:
        raise ValueError("no split, or no models")
    for summary in result["models"].values():
        for direction in ("image_to_text", "text_to_image"):
            side = summary[direction]
            if type(side["queries"]) is not int or type(side["gallery"]) is not int:
                raise ValueError("a size is no whole number")
            for k in (1, 5, 10):
                low, high = _bounds(side, f"R@{k}")
                if not all(_is_percentage(value) for value in (low, side[f"R@{k}"], high)):
                    raise ValueError("a recall is out of bounds")


def _is_percentage(value) -> bool:
    """Whether a number is a percentage, or one less or more its spread."""
    return type(value) in (int, float) and -100 <= value <= 200


def draw_models(result: dict) -> Figure:
    """The recalls of an evaluation's models in both directions, with their intervals or spreads.

    Args:
        result: as ``retrieval.evaluation.evaluate`` gives it.
    """
    models = result["models"]
    figure = Figure(figsize=(10.4, 1.4 + 0.34 * len(models)), layout="constrained")
    names = (("image_to_text", "Image → caption", PICTURE), ("text_to_image", "Caption → image", CAPTION))
    place = np.arange(len(models))
    for axes, (direction, name, colour) in zip(figure.subplots(1, 2, sharey=True), names, strict=True):
        sides = [summary[direction] for summary in models.values()]
        for k, marker in ((1, "o"), (5, "s"), (10, "^")):
            value = np.array([side[f"R@{k}"] for side in sides])
            low, high = np.array([_bounds(side, f"R@{k}") for side in sides]).T
            bars = np.maximum([value - low, high - value], 0)
            axes.errorbar(value, place, xerr=bars, fmt=marker, color=colour, capsize=2, markersize=5, label=f"R@{k}")
        axes.set(
            xlim=(0, None),
            xlabel="recall in %",
            title=f"{name}\n{result['split']}: {sides[0]['queries']:,} queries, gallery of {sides[0]['gallery']:,}",
        )
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        axes.legend(loc="lower right")
    figure.axes[0].set_yticks(place, [name.replace("_transductive", "\n(transductive)") for name in models])
    figure.axes[0].invert_yaxis()
    return figure


def _bounds(side: dict, name: str) -> tuple[float, float]:
    """A number's interval, or the spread between random maps; chance has neither."""
    if f"{name}_sd" in side:
        return side[name] - side[f"{name}_sd"], side[name] + side[f"{name}_sd"]
    return tuple(side.get(f"{name}_ci", (side[name], side[name])))


def _plain_ticks(axes: Axes) -> None:
    """1, 10, 100 and 1,000 under a logarithmic axis, rather than powers."""
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")


def _hit_curve(ranks: Ranks, cutoffs: np.ndarray) -> np.ndarray:
    return np.array([100 * ranks.hit_at(int(k)).mean() for k in cutoffs])


def draw_features(store: FeatureStore, memory: int) -> Figure:
    """PCA of the image and caption features, coloured by split, and the share of variance that components hold.

    A kind that the store has not is left out.

    Args:
        memory: bytes; of features that would take more than an eighth of it a sample of rows is drawn.

    Raises:
        PlotError: no kind has two rows.
    """
    from sklearn.decomposition import PCA

    splits = np.array([*store.image_splits, ""])  # the last one: of a caption without an image
    split_of_row = {"image": splits[:-1], "text": splits[store.image_index]}
    kinds = [kind for kind in KINDS if store.recipes[kind] and len(split_of_row[kind]) > 1]
    if not kinds:
        raise PlotError(f"{store.path} has no two images or captions with features; there is nothing to draw")
    figure = Figure(figsize=(12.5 * (len(kinds) + 1) / 3, 4.2), layout="constrained")
    *scatters, curve = figure.subplots(1, len(kinds) + 1)
    for axes, kind in zip(scatters, kinds, strict=True):
        name, colour = {"image": ("image features", PICTURE), "text": ("caption features", CAPTION)}[kind]
        stored = store.features(kind)
        most = max(1000, memory // (8 * 4 * stored.shape[-1]))
        rows = np.sort(np.random.default_rng(0).permutation(len(stored))[:most])
        features, of_split = _plain_features(stored, rows), split_of_row[kind][rows]
        shown = f"{len(stored):,} rows" if len(rows) == len(stored) else f"{len(rows):,} of {len(stored):,} rows"
        components = min(256, *features.shape)
        model = PCA(components, svd_solver="randomized", random_state=0).fit(features)
        places = np.pad(model.transform(features), ((0, 0), (0, 1)))[:, :2]  # one component: a line
        for split in dict.fromkeys(split for split in SPLIT_COLOURS if (of_split == split).any()):
            mine = of_split == split
            axes.scatter(
                *places[mine].T,
                s=4,
                linewidths=0,
                alpha=0.5,
                c=SPLIT_COLOURS[split],
                label=f"{split or 'no split'} ({mine.sum():,})",
                rasterized=True,
            )
        axes.set(
            xlabel="component 1",
            ylabel="component 2",
            title=f"PCA of {name}\n{shown} of {features.shape[1]:,} numbers",
        )
        axes.legend(
            markerscale=3, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, columnspacing=1, fontsize=9
        )
        curve.plot(
            np.arange(1, components + 1), 100 * np.cumsum(model.explained_variance_ratio_), color=colour, label=name
        )
    curve.set(
        xscale="log",
        xlabel="components",
        ylabel="variance held, in %",
        ylim=(0, 100),
        title="How many dimensions the features use",
    )
    _plain_ticks(curve)
    curve.legend(loc="upper left")
    return figure


def _plain_features(stored: StoredRows, rows: np.ndarray) -> np.ndarray:
    """Features of some rows, of images those of the plain view: float32 (R, D)."""
    features = np.empty((len(rows), stored.shape[-1]), np.float32)
    for block in row_blocks(len(rows)):
        values = stored[rows[block]]
        features[block] = values[:, 0] if values.ndim == 3 else values
    return features


def plot_hits(hits: "list[Hit]", query: "Query", kind: str, out: Path) -> None:
    """Draws the hits of one search to the file ``out``.

    Raises:
        PlotError: no thumbnails to draw, or a suffix that names no image format.
    """
    with matplotlib.rc_context(_STYLE):
        save_figure(draw_hits(hits, query, kind), out)


def draw_hits(hits: "list[Hit]", query: "Query", kind: str) -> Figure:
    """The hits of one search: images with their scores (``kind`` image), or captions beside the query's image.

    Raises:
        PlotError: images are to be drawn and the store has no thumbnails.
    """
    if kind == "text":
        return _draw_captions(hits, query)
    if any(hit.thumbnail is None for hit in hits):
        raise PlotError("the store was made with --no-thumbnails; there are no images to draw")
    columns = min(5, len(hits))
    rows = -(-len(hits) // columns)
    figure = Figure(figsize=(2.5 * columns, 3.0 * rows + 0.5), layout="constrained")
    asked = [f"“{query.sentence}”"] if query.sentence else []
    asked += [Path(query.picture).name] if query.picture else []
    figure.suptitle("\n".join(textwrap.wrap(" + ".join(asked), 30 * columns)))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, hit in zip(grid.flat, hits, strict=False):
        axes.imshow(_thumbnail(hit))
        caption = hit.captions[0] if hit.captions else hit.id
        axes.set_title(f"{hit.rank}. {hit.score:.3f}", fontsize=11)
        axes.text(
            0.5,
            -0.03,
            "\n".join(textwrap.wrap(caption, 30)[:3]),
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize=8,
        )
    return figure


def _thumbnail(hit: "Hit") -> Image.Image:
    try:
        return Image.open(io.BytesIO(hit.thumbnail), formats=("JPEG",)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PlotError(f"the thumbnail of {hit.id} is damaged; verify the store, or extract again") from error


def _draw_captions(hits: "list[Hit]", query: "Query") -> Figure:
    lines = [
        textwrap.wrap(f"{hit.rank}.  {hit.score:.3f}  {hit.captions[0]}", 70, subsequent_indent="      ")
        for hit in hits
    ]
    figure = Figure(figsize=(11, max(3.2, 0.5 + 0.24 * sum(map(len, lines)) + 0.12 * len(lines))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    left.axis("off")
    if query.picture:
        picture = read_picture(query.picture)
        picture.thumbnail((QUERY_SIZE, QUERY_SIZE))
        left.imshow(picture)
    asked = [Path(query.picture).name] if query.picture else []
    asked += textwrap.wrap(f"“{query.sentence}”", 36) if query.sentence else []
    left.set_title("\n".join(asked))
    right.axis("off")
    right.text(
        0,
        1,
        "\n\n".join("\n".join(line) for line in lines),
        transform=right.transAxes,
        va="top",
        fontsize=11,
        linespacing=1.3,
    )
    return figure


def _pairs(embeddings: Embeddings, split: str, most: int, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows of a seeded sample of a split's images that have captions, of one caption of each; how many there were."""
    pictures, captions, image_index = embeddings.split(split)
    first = np.unique(image_index, return_index=True)[1]
    chosen = np.sort(np.random.default_rng(seed).permutation(len(first))[:most])
    if len(chosen) < 3:
        raise PlotError(f"the split {split!r} has {len(first)} images with captions; too few to draw")
    return pictures[image_index[first[chosen]]], captions[first[chosen]], len(first)
