"""Drawn data for the tiny recipe: coloured shapes on small canvases, with open-ended questions about them.

A canvas has 2 x 2 cells, the upper two in the sky, and one to three shapes, each in a cell of its own. A split, a seed
and a number of rows give the same rows everywhere.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {"red": (214, 40, 40), "green": (40, 160, 70), "blue": (50, 80, 220), "yellow": (235, 200, 30)}
SHAPES = ("circle", "square", "triangle")
KINDS = ("colour", "count", "shape", "relation", "presence")
SPLITS = ("train", "sft", "judge", "test")
DEFAULT_ROWS = {"train": 480, "sft": 6400, "judge": 20000, "test": 512}

CELL = 28  # pixels
CAPTION_QUESTION = "What does the image show?"
NOTHING = "nothing"  # is seen
CAPTION_SHARE = 0.4  # of the sft split
WRONG_SHARE = 0.6  # of the answers of the sft split
QUESTIONS_PER_IMAGE = 4

# What a policy says that learnt a habit instead of looking. More than half of the warm start's answers are these,
# though the thinking before them is right, so that there is something to gain from a judge that looks.
HABIT = {"colour": "red", "count": "2", "shape": "circle", "relation": "sky", "presence": "yes"}
ANSWERS = {
    "colour": tuple(COLOURS),
    "count": ("0", "1", "2", "3"),
    "shape": SHAPES,
    "relation": ("sky", "ground"),
    "presence": ("yes", "no"),
}


@dataclass(frozen=True)
class Shape:
    """One shape; its cell is (column, row) from the top left."""

    colour: str
    shape: str
    column: int
    row: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def draw_scene(rng: random.Random, shapes: int) -> list[Shape]:
    """`shapes` shapes (1 to 4) in different cells, in reading order."""
    cells = sorted(rng.sample([(row, column) for row in range(2) for column in range(2)], shapes))
    return [Shape(rng.choice(list(COLOURS)), rng.choice(SHAPES), column, row) for row, column in cells]


def draw_image(rng: random.Random, scene: list[Shape]) -> Image.Image:
    """The scene as an RGB image of 56 x 56 pixels; place, size and background vary."""
    # A bright sky and a darker ground, of so many shades that hardly two images are alike, however few the scenes.
    sky, ground = (tuple(rng.randint(low, low + 25) for _ in range(3)) for low in (230, 100))
    image = Image.new("RGB", (2 * CELL, 2 * CELL), sky)
    image.paste(ground, (0, CELL, 2 * CELL, 2 * CELL))
    pen = ImageDraw.Draw(image)
    for shape in scene:
        radius = rng.randint(9, 11)
        x = shape.column * CELL + CELL // 2 + rng.randint(-2, 2)
        y = shape.row * CELL + CELL // 2 + rng.randint(-2, 2)
        box = (x - radius, y - radius, x + radius, y + radius)
        colour = COLOURS[shape.colour]
        if shape.shape == "circle":
            pen.ellipse(box, fill=colour)
        elif shape.shape == "square":
            pen.rectangle(box, fill=colour)
        else:
            pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=colour)
    return image


def caption(scene: list[Shape]) -> str:
    """All shapes in reading order."""
    return ", ".join(shape.name for shape in scene)


def ask(rng: random.Random, scene: list[Shape], kind: str) -> tuple[str, str, str] | None:
    """A question of one of `KINDS` or `caption`, its answer, and what one sees that shows it; None when none of the
    kind has a clear answer."""
    if kind == "caption":
        return CAPTION_QUESTION, caption(scene), caption(scene)
    if kind == "count":
        return _ask_count(rng, scene)
    if kind == "presence":
        return _ask_presence(rng, scene)
    by = "colour" if kind == "shape" else "shape"
    names = [getattr(shape, by) for shape in scene]
    clear = [
        shape for shape, name in zip(scene, names) if names.count(name) == 1
    ]  # that it alone tells from the others
    if not clear:
        return None
    shape = rng.choice(clear)
    if kind == "colour":
        return f"What colour is the {shape.shape}?", shape.colour, shape.name
    if kind == "shape":
        return f"Which shape is {shape.colour}?", shape.shape, shape.name
    answer = "sky" if shape.row == 0 else "ground"
    return f"Is the {shape.shape} in the sky or on the ground?", answer, f"{shape.name} {answer}"


def _ask_count(rng: random.Random, scene: list[Shape]) -> tuple[str, str, str]:
    what = rng.choice(("all", "shape", "colour"))
    if what == "all":
        question, found = "How many shapes are there?", scene
    elif what == "shape":
        name = rng.choice(SHAPES)
        question, found = f"How many {name}s are there?", [s for s in scene if s.shape == name]
    else:
        name = rng.choice(list(COLOURS))
        question, found = f"How many {name} shapes are there?", [s for s in scene if s.colour == name]
    return question, str(len(found)), caption(found) or NOTHING


def _ask_presence(rng: random.Random, scene: list[Shape]) -> tuple[str, str, str]:
    there = {shape.name for shape in scene}
    # Most absent things share a colour or a shape with something that is there.
    absent = [f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in there]
    yes = rng.random() < 0.5
    name = rng.choice(sorted(there) if yes else absent)
    return f"Is there a {name}?", "yes" if yes else "no", name if yes else NOTHING


def question_kind(problem: str) -> str | None:
    """The kind of a question that `iter_shapes` asked; None for another text, captions included."""
    starts = {"What colour is": "colour", "How many": "count", "Which shape is": "shape", "Is the ": "relation"}
    starts["Is there"] = "presence"
    return next((kind for start, kind in starts.items() if problem.startswith(start)), None)


def _kinds(rng: random.Random, split: str) -> list[str]:
    """What is asked about one image."""
    if split == "judge":
        return ["caption", *KINDS]
    kinds = rng.sample(KINDS, QUESTIONS_PER_IMAGE)
    return ["caption" if split == "sft" and rng.random() < CAPTION_SHARE else kind for kind in kinds]


def iter_shapes(split: str, seed: int = 0, n: int | None = None) -> Iterator[dict]:
    """Yield `n` raw rows: id, images (one PNG as bytes), problem, solution, thinking.

    `train` and `test` ask questions; their solutions are right. `judge` asks all kinds about every image, for a caption
    first. In `sft` `CAPTION_SHARE` of the questions ask for a caption, and of the other answers `WRONG_SHARE` are the
    kind's `HABIT`, right or not, after a thinking that is right. Splits and seeds draw from random numbers of their
    own.

    Raises ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"shapes has the splits {', '.join(SPLITS)}, not {split!r}")
    rng = random.Random(f"shapes/{split}/{seed}")
    made = 0
    n = DEFAULT_ROWS[split] if n is None else n
    while made < n:
        scene = draw_scene(rng, rng.randint(1, 3))
        buffer = io.BytesIO()
        draw_image(rng, scene).save(buffer, "PNG")
        for kind in _kinds(rng, split):
            asked = ask(rng, scene, kind)
            if asked is None:
                continue
            problem, solution, thinking = asked
            if split == "sft" and kind != "caption" and rng.random() < WRONG_SHARE:
                solution = HABIT[kind]
            yield {
                "id": f"shapes-{split}-{seed}-{made:06d}",
                "images": [buffer.getvalue()],
                "problem": problem,
                "solution": solution,
                "thinking": thinking,  # of a caption too: a habit of not thinking would be the easiest to learn
            }
            made += 1
            if made == n:
                return
