"""Rows of the package easy-vqa for the recipes tiny-vqa: `pip download --no-deps easy-vqa`, then

`python -m tests.bench.easy_vqa easy_vqa-*.whl data` writes data/start, data/judge, data/train and data/test.

Questions that are not yes or no: of the 4,000 training images each belongs to one of the first three; the 500
held-out questions are about the package's test images. As in `grpo/tiny`, of the warm start's answers 60 % are the
habit of their kind, right or not: GRPO has something to gain.
"""

from __future__ import annotations

import io
import json
import random
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from r1vfree_cli.data.prepare import prepare

PARTS = {"start": range(1000), "judge": range(1000, 3200), "train": range(3200, 4000), "test": None}
HELD_OUT = 500
SHAPES = ("circle", "rectangle", "triangle")
WRONG_SHARE = 0.6  # of the warm start's answers are the habit


def main(wheel: str, out: str) -> None:
    with zipfile.ZipFile(wheel) as package, TemporaryDirectory() as folder:
        package.extractall(folder)
        rng = random.Random(0)
        data = Path(folder) / "easy_vqa" / "data"
        for part, images in PARTS.items():
            split = "test" if images is None else "train"
            asked = json.loads((data / split / "questions.json").read_text())
            rows = [
                {"image": f"{image}.png", "problem": question[0].upper() + question[1:], "solution": answer}
                for question, answer, image in asked
                if answer not in ("yes", "no") and (images is None or image in images)
            ]
            for row in rows if part == "start" else ():
                if rng.random() < WRONG_SHARE:
                    row["solution"] = "circle" if row["solution"] in SHAPES else "red"
            lines = io.StringIO()
            lines.writelines(json.dumps(row) + "\n" for row in rows)
            file = Path(folder) / f"{part}.jsonl"
            file.write_text(lines.getvalue())
            limit = HELD_OUT if images is None else None
            prepare(
                "files", Path(out) / part, input=str(file), images=data / split / "images", split=split, limit=limit
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
