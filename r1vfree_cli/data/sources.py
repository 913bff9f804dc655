"""The sources of data: where each is on the hub, how its records become raw rows.

Every source reads the hub through `datasets`, or a local copy of the same layout (`tables`).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..core import console
from ..core.errors import UsageError, did_you_mean
from ..core.machine import library
from .drops import RowProblem
from .layouts import first, own_rows, parsed, read
from .rows import COLUMNS, RawRow
from .tables import Table, canonical, dataset_table, open_local


@dataclass(frozen=True)
class Source:
    """One source.

    hub: its repository on the hub; None when it only reads local files (or draws).
    convert: a record (dict of its columns) -> `RawRow`; raises `RowProblem`.
    rename: split of the source -> split that it becomes. columns: which of the row's columns hold something.
    text_only: whether rows without an image are kept.
    """

    name: str
    convert: Callable[[dict], RawRow]
    hub: str | None = None
    rename: dict[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ("id", "images", "problem", "solution", "source")
    text_only: bool = False


def _r1v_rows(record: dict) -> RawRow:
    """R1-V's layout: image, problem, solution in <answer> tags; `thinking` in the distilled one. Ids are made."""
    return replace(own_rows(record), id=None)


def _rlhf_v(record: dict) -> RawRow:
    """RLHF-V: `text` holds JSON with question, chosen and rejected; copies of it have these as columns. `chosen`, a
    person's correction of a model's answer, becomes the reference answer."""
    texts = parsed(record["text"]) if "question" not in record and "text" in record else record
    if not isinstance(texts, dict):
        raise RowProblem("text is not JSON")
    # `image_path` names a file of the original data sets, which is not part of this one.
    return RawRow(images=first(record, "images", "image"), problem=texts.get("question"), solution=texts.get("chosen"))


def _r1v_free(record: dict) -> RawRow:
    """R1V-Free's copy of RLHF-V: problem and solution as columns beside RLHF-V's own."""
    problem = first(record, "problem", "question")
    if problem is None and "text" in record:
        return _rlhf_v(record)
    return RawRow(images=first(record, "images", "image"), problem=problem, solution=record.get("solution"))


def _hallusionbench(record: dict) -> RawRow:
    """HallusionBench, from its JSON (`filename` in the image folder) or the hub copy (`image`)."""
    keys = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id")
    if any(record.get(key) is None for key in keys):
        raise RowProblem("HallusionBench keys missing")
    answer = {"0": "no", "1": "yes"}.get(str(record.get("gt_answer")))
    if answer is None:
        raise RowProblem("gt_answer is neither 0 nor 1")
    name, images = "/".join(str(record[key]) for key in keys), first(record, "image", "filename")
    return RawRow(id=name, images=images, problem=record.get("question"), solution=answer)


_HALLUSION_SPLITS = {"image": "test", "non_image": "test", "train": "test"}
SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source("rlhf-v", _rlhf_v, "openbmb/RLHF-V-Dataset"),
        Source("r1v-free", _r1v_free, "Exgc/R1V-Free_RLHFV"),
        Source("clevr-count", _r1v_rows, "leonardPKU/clevr_cogen_a_train"),
        Source("clevr-complex", _r1v_rows, "MMInstruction/Clevr_CoGenT_TrainA_70K_Complex"),
        Source("geoqa", _r1v_rows, "leonardPKU/GEOQA_R1V_Train_8K"),
        Source("clevr-r1", _r1v_rows, "MMInstruction/Clevr_CoGenT_TrainA_R1", columns=COLUMNS),
        Source("hallusionbench", _hallusionbench, "lmms-lab/HallusionBench", _HALLUSION_SPLITS, text_only=True),
        *(Source(name, read) for name in ("files", "jsonl", "parquet")),  # the same: files say what they are
        Source("shapes", own_rows, columns=COLUMNS),
    )
}
BY_HUB = {source.hub: source for source in SOURCES.values() if source.hub}


def find_source(name: str) -> Source:
    """The source of that name, or of that hub repository. Raises UsageError: there is none; names the nearest."""
    found = SOURCES.get(name) or BY_HUB.get(name)
    if found:
        return found
    hint = f"r1v prepare-data files --input {name}" if os.path.exists(name) else did_you_mean(name, SOURCES)
    raise UsageError(f"unknown source {name!r}; known are {', '.join(SOURCES)}", hint=hint)


def open_source(
    source: Source, *, input: str | None, images: Sequence[Path] | None, split: str | None, limit: int | None, seed: int
) -> dict[str, list[Table]]:
    """Find a source's records, split -> tables, by the arguments of `prepare`.

    Raises UsageError: no such input, folder or split; some files' split is not known; the hub cannot be reached.
    DataError: unreadable files.
    """
    for folder in images or ():
        if not os.path.isdir(folder):
            raise UsageError(f"no image folder {folder}")
    if source.name == "shapes":
        if input is not None or images:
            raise UsageError("shapes are drawn: --input and --images do not apply")
        return _drawn(split, limit, seed)
    if input is None and source.hub is None:
        raise UsageError(f"source {source.name} needs --input, a file or a folder")
    if input is not None and not os.path.exists(input):
        raise UsageError(f"no such --input: {input}")
    found = _hub(source.hub) if input is None else open_local(Path(input), images, tuple(source.rename))
    return _chosen(source, found, split, input or str(source.hub))


def _chosen(
    source: Source, found: list[tuple[str | None, Table]], split: str | None, where: str
) -> dict[str, list[Table]]:
    """The tables of the wanted split, or of all. Tables of no known split are train, where no other is known."""
    known = sorted({name for name, _ in found if name is not None})
    unknown = ", ".join([table.name for name, table in found if name is None][:5])
    if known and unknown and split is None:
        what = f"{where}: the split of {unknown} is not known, while other files say {', '.join(known)}"
        hint = "--split NAME reads the files of one split; a split is a word of a file's or folder's name"
        raise UsageError(what, hint=hint)
    if known and unknown:
        console.warn(f"{where}: left out, their split is not known: {unknown}")
    tables: dict[str, list[Table]] = {}
    for name, table in found:
        name = name or (None if known else "train")
        if name is not None and (split in (None, name, source.rename.get(name)) or canonical(split) == name):
            tables.setdefault(source.rename.get(name, name), []).append(table)
    if not tables:
        what = f"{where} has no split {split!r}; it has {', '.join(known) or 'train'}"
        raise UsageError(what, details=[f"{name or 'split not known'}: {table.name}" for name, table in found[:20]])
    return tables


def _hub(name: str | None) -> list[tuple[str | None, Table]]:
    """Download a repository's splits, or find them in the cache of `datasets`."""
    import datasets

    hint = "check the connection and `hf auth login`, or give a local copy with --input"
    with library(f"cannot load {name} from the hub", UsageError, hint):
        found = datasets.load_dataset(name)
    return [(split, dataset_table(found[split], f"{name}/{split}", ())) for split in found]


def _drawn(split: str | None, limit: int | None, seed: int) -> dict[str, list[Table]]:
    from . import shapes

    if split is not None and split not in shapes.SPLITS:
        raise UsageError(f"shapes has no split {split!r}; it has {', '.join(shapes.SPLITS)}")

    def table(name: str) -> Table:
        rows = shapes.DEFAULT_ROWS[name] if limit is None else limit
        return Table(f"shapes {name}", rows, (), lambda: ([row] for row in shapes.iter_shapes(name, seed, rows)))

    return {name: [table(name)] for name in ([split] if split else shapes.SPLITS)}
