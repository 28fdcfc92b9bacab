"""Draws the small captioned dataset that the demo and tests run on: two coloured shapes in a relation, seeded.

Every caption names both shapes, both colours and the relation, and every scene is drawn once, so no caption belongs
to two images.
"""

import csv
import io
import itertools
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 224  # pixels a side
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 87, 214),
    "yellow": (240, 208, 32),
    "purple": (140, 60, 180),
    "orange": (255, 127, 14),
    "black": (24, 24, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
_SENTENCES = {
    "left": (
        "A {a} to the left of a {b} .",
        "A {b} to the right of a {a} .",
        "On the left there is a {a} , and on the right a {b} .",
        "The image shows a {a} left of a {b} .",
        "Right of the {a} lies a {b} .",
        "A {a} stands beside a {b} , which is further right .",
        "Two shapes side by side : first a {a} , then a {b} .",
    ),
    "above": (
        "A {a} above a {b} .",
        "A {b} below a {a} .",
        "At the top there is a {a} , and at the bottom a {b} .",
        "The image shows a {a} over a {b} .",
        "Under the {a} lies a {b} .",
        "A {a} hangs over a {b} , which is further down .",
        "Two shapes in a column : first a {a} , then a {b} .",
    ),
}


@dataclass(frozen=True)
class Scene:
    """``first`` stands ``relation`` (left or above) of ``second``; both are (colour, shape)."""

    first: tuple[str, str]
    second: tuple[str, str]
    relation: str

    def captions(self, generator: np.random.Generator, count: int = 5) -> list[str]:
        """Different sentences that describe the scene, in a random order."""
        chosen = generator.permutation(len(_SENTENCES[self.relation]))[:count]
        a = " ".join(self.first)
        b = " ".join(self.second)
        return [_SENTENCES[self.relation][number].format(a=a, b=b) for number in chosen]

    def draw(self, generator: np.random.Generator) -> Image.Image:
        """The scene as an RGB image; places, sizes and the light background vary."""
        image = Image.new("RGB", (SIZE * 2, SIZE * 2), tuple(int(level) for level in generator.integers(200, 256, 3)))
        canvas = ImageDraw.Draw(image)
        for (colour, shape), near in ((self.first, 0.28), (self.second, 0.72)):
            place = [near, 0.5] if self.relation == "left" else [0.5, near]
            x, y = ((part + generator.uniform(-0.05, 0.05)) * SIZE * 2 for part in place)
            _draw_shape(canvas, shape, COLOURS[colour], x, y, generator.uniform(0.15, 0.21) * SIZE * 2)
        return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], x: float, y: float, radius: float
) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "ring":
        canvas.ellipse(box, outline=colour, width=round(radius * 0.35))
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    else:
        corners, inner = (3, 0.5) if shape == "triangle" else (5, 0.4)
        reach = itertools.cycle((radius, radius * inner))
        points = [(next(reach), math.pi * (step / corners - 0.5)) for step in range(2 * corners)]
        canvas.polygon([(x + r * math.cos(turn), y + r * math.sin(turn)) for r, turn in points], fill=colour)


def all_scenes() -> list[Scene]:
    """Every scene of two different things, each once."""
    things = list(itertools.product(COLOURS, SHAPES))
    pairs = itertools.permutations(things, 2)
    return [Scene(first, second, relation) for first, second in pairs for relation in _SENTENCES]


def draw_dataset(
    folder: str | Path, train: int = 300, dev: int = 40, test: int = 200, seed: int = 0
) -> tuple[str, Path]:
    """Draws images and ``captions.csv`` (image, caption, split) into ``folder``, which appears complete.

    What is there already is left alone.

    Returns:
        A sentence and an image, of scenes that are not in the dataset, to try a search with.
    """
    folder = Path(folder)
    generator = np.random.default_rng(seed)
    scenes = all_scenes()
    order = generator.permutation(len(scenes))
    splits = ["train"] * train + ["dev"] * dev + ["test"] * test
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(("image", "caption", "split"))
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    if not folder.exists():
        try:
            (aside / "images").mkdir(parents=True)
            for number, split in enumerate(splits):
                scene = scenes[order[number]]
                name = f"images/{number:04d}.jpg"
                scene.draw(generator).save(aside / name, quality=92)
                table.writerows((name, caption, split) for caption in scene.captions(generator))
            (aside / "captions.csv").write_text(rows.getvalue(), encoding="utf-8")
            scenes[order[len(splits)]].draw(np.random.default_rng(seed)).save(aside / "query.jpg", quality=92)
            os.replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    unseen = scenes[order[len(splits)]]
    return unseen.captions(np.random.default_rng(seed), 1)[0], folder / "query.jpg"
