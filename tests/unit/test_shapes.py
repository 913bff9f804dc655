"""Drawn data: what the questions say is what the pixels show, and splits and seeds stay apart."""

from __future__ import annotations

import io
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from r1vfree_cli.core import prompts
from r1vfree_cli.data import shapes


def rows(split: str, n: int, seed: int = 0) -> list[dict]:
    return list(shapes.iter_shapes(split, seed, n))


def seen(png: bytes) -> list[tuple[str, str, int, int]]:
    """(colour, shape, column, row) of each thing in an image, read from its pixels alone, in reading order."""
    image = np.asarray(Image.open(io.BytesIO(png)))
    found = []
    for row in range(2):
        for column in range(2):
            cell = image[row * 28 : row * 28 + 28, column * 28 : column * 28 + 28]
            masks = {name: (cell == rgb).all(-1) for name, rgb in shapes.COLOURS.items()}
            name, mask = max(masks.items(), key=lambda item: item[1].sum())
            if mask.sum() > 20:  # fewer: a neighbour's edge
                found.append((name, outline(mask), column, row))
    return found


def outline(mask: np.ndarray) -> str:
    widths = [w for w in mask.sum(1) if w]
    if min(widths) == max(widths):
        return "square"
    return "triangle" if widths[-1] == max(widths) else "circle"


def answer_from_pixels(problem: str, things: list[tuple[str, str, int, int]]) -> str:
    words = problem.rstrip("?").replace(",", "").split()
    kind = shapes.question_kind(problem)
    if kind == "colour":
        (thing,) = [t for t in things if t[1] == words[-1]]
        return thing[0]
    if kind == "shape":
        (thing,) = [t for t in things if t[0] == words[-1]]
        return thing[1]
    if kind == "presence":
        return "yes" if any(list(t[:2]) == words[-2:] for t in things) else "no"
    if kind == "count":
        what = words[2].removesuffix("s")
        if what in shapes.COLOURS:
            return str(sum(t[0] == what for t in things))
        return str(len(things) if what == "shape" else sum(t[1] == what for t in things))
    (thing,) = [t for t in things if t[1] == words[2]]
    return "sky" if thing[3] == 0 else "ground"


def evidence_from_pixels(problem: str, things: list[tuple[str, str, int, int]]) -> str:
    """What the thinking names: the things that the question is about, with their place where it asks for that."""
    words, kind = problem.rstrip("?").split(), shapes.question_kind(problem)
    if kind in ("relation", "presence"):
        things = [t for t in things if t[1] == words[2]] if kind == "relation" else things
        things = [t for t in things if list(t[:2]) == words[-2:]][:1] if kind == "presence" else things
    elif words[2] != "shapes" or kind != "count":
        about = words[2].removesuffix("s") if kind == "count" else words[-1]
        things = [t for t in things if about in t]
    place = "" if kind != "relation" else (" sky" if things[0][3] == 0 else " ground")
    return (", ".join(f"{colour} {shape}" for colour, shape, _, _ in things) or shapes.NOTHING) + place


@pytest.mark.parametrize("split", ["train", "test", "judge"])
def test_solutions_are_what_the_pixels_show(split):
    kinds = Counter()
    for row in rows(split, 300, seed=3):
        things = seen(row["images"][0])
        caption = ", ".join(f"{colour} {shape}" for colour, shape, _, _ in things)
        kind = shapes.question_kind(row["problem"])
        if kind is None:
            assert row["solution"] == caption
        else:
            assert row["solution"] == answer_from_pixels(row["problem"], things)
            assert row["thinking"] == evidence_from_pixels(row["problem"], things)
            assert row["solution"] in shapes.ANSWERS[kind]
            kinds[kind] += 1
    assert set(kinds) == set(shapes.KINDS)
    assert min(kinds.values()) > 0.05 * kinds.total()


def test_sft_has_captions_and_habits_in_the_stated_shares():
    found = rows("sft", 4000)
    captions = [r for r in found if shapes.question_kind(r["problem"]) is None]
    assert abs(len(captions) / len(found) - shapes.CAPTION_SHARE) < 0.06
    wrong = habits = 0
    asked = [r for r in found if r not in captions]
    for row in asked:
        right = answer_from_pixels(row["problem"], seen(row["images"][0]))
        habit = shapes.HABIT[shapes.question_kind(row["problem"])]
        wrong += row["solution"] != right
        habits += row["solution"] == habit
        assert row["solution"] in (right, habit)
        assert row["thinking"] == evidence_from_pixels(row["problem"], seen(row["images"][0]))  # right, always
    assert 0.3 < wrong / len(asked) < shapes.WRONG_SHARE
    assert habits / len(asked) > shapes.WRONG_SHARE


def test_splits_and_seeds_share_no_image_and_no_id():
    images: dict[bytes, tuple] = {}
    ids = set()
    for split in shapes.SPLITS:
        for seed in (0, 1):
            for row in rows(split, 200, seed):
                assert images.setdefault(row["images"][0], (split, seed)) == (split, seed)
                assert row["id"] not in ids
                ids.add(row["id"])


def test_the_same_call_gives_the_same_rows():
    assert rows("train", 50, 7) == rows("train", 50, 7)
    assert rows("train", 50, 7) == rows("train", 80, 7)[:50]
    random.seed(1)
    first = rows("train", 5)
    random.seed(2)
    assert rows("train", 5) == first


def test_rows_are_images_that_rows_accept_and_targets_that_parse():
    for row in rows("sft", 100):
        image = Image.open(io.BytesIO(row["images"][0]))
        assert image.size == (56, 56) and image.mode == "RGB" and image.format == "PNG"
        parsed = prompts.parse(prompts.target_text(row["thinking"], row["solution"]))
        assert parsed.problem is None and parsed.answer == row["solution"]


def test_absent_and_present_things_are_asked_alike():
    found = [r for r in rows("train", 2000) if shapes.question_kind(r["problem"]) == "presence"]
    yes = sum(r["solution"] == "yes" for r in found) / len(found)
    assert 0.4 < yes < 0.6


def test_number_of_rows_and_defaults():
    assert len(rows("train", 1)) == 1
    assert rows("train", 0) == []
    assert len(list(shapes.iter_shapes("test"))) == shapes.DEFAULT_ROWS["test"]


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="'dev'"):
        next(shapes.iter_shapes("dev"))


def test_other_questions_have_no_kind():
    assert shapes.question_kind("What model of a vehicle can be seen on the right?") is None
