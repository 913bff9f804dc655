"""Data sets: records, files and images that are wrong, for prepare-data, for `data.path`, and for loading rows."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image

from . import values
from .harness import Case, Link
from .recipes import GRPO, dumped

SIZE = (40, 32)


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@cache
def images() -> dict[str, bytes]:
    """File name -> image, one of each kind that a data set may hold; the last ones are no usable images."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8))
    deep = Image.fromarray(np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE[1], SIZE[0]) * 50)
    frames = [rgb.rotate(90 * i).resize(SIZE) for i in range(3)]
    png = _saved(rgb, "PNG")
    found = {
        "a.png": png,
        "a.jpg": _saved(rgb, "JPEG"),
        "cmyk.jpg": _saved(rgb.convert("CMYK"), "JPEG"),
        "grey.png": _saved(rgb.convert("L"), "PNG"),
        "alpha.png": _saved(rgb.convert("RGBA"), "PNG"),
        "palette.png": _saved(rgb.convert("P"), "PNG", transparency=0),
        "one-bit.png": _saved(rgb.convert("1"), "PNG"),
        "deep.png": _saved(deep, "PNG"),
        "deep.tiff": _saved(deep, "TIFF"),
        "float.tiff": _saved(Image.fromarray(np.full((32, 40), np.nan, np.float32)), "TIFF"),
        "lab.tiff": _saved(rgb.convert("LAB"), "TIFF"),
        "moving.gif": _saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "moving.png": _saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "a.webp": _saved(rgb, "WEBP"),
        "a.bmp": _saved(rgb, "BMP"),
        "a.ppm": _saved(rgb, "PPM"),
        "wrong-extension.jpg": png,
        "turned.jpg": _saved(rgb, "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"),
        "pixel.png": _saved(rgb.resize((1, 1)), "PNG"),
        "ribbon.png": _saved(rgb.resize((9000, 28)), "PNG"),
        "truncated.png": png[: len(png) // 2],
        "truncated.jpg": _saved(rgb, "JPEG")[:400],
        "bomb.png": bomb(),
        "text.png": b"this is text",
        "empty.png": b"",
        "page.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 32\n",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }  # fmt: skip
    return found


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few kilobytes that says it has billions of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\x00" * 10_000))
        + chunk(b"IEND", b"")
    )


NAMES = (*images(), "nothing.png", "../outside.png", "/etc/hostname", "a/../../outside.png", "out-link.png", "loop.png", "folder", ".", "",
         "a\x00.png", "x" * 5000, "http://127.0.0.1:9/a.png", "file:///etc/hostname", "data:image/png;base64,aGk=", "\ud800.png", "A.PNG")  # fmt: skip
RECORD = {
    "id": "1",
    "image": "a.png",
    "problem": "What colour is it?",
    "solution": "<answer>red</answer>",
    "thinking": None,
}
TEXT = '{"question": "What colour?", "chosen": "red", "rejected": "blue"}'
HALLUSION = {"category": "VD", "subcategory": "figure", "visual_input": "1", "set_id": "0", "figure_id": "0", "question_id": "0",
             "question": "Is it?", "gt_answer": "1", "filename": "a.png"}  # fmt: skip
BASES = {
    "jsonl": RECORD,
    "rlhf-v": {"image": "a.png", "text": TEXT},
    "r1v-free": {"image": "a.png", "text": TEXT, "problem": "What?", "solution": "red"},
    "clevr-count": {"image": "a.png", "problem": "How many?", "solution": "<answer> 3 </answer>"},
    "clevr-complex": {"image": "a.png", "problem": "How many?", "solution": "3"},
    "geoqa": {"image": "a.png", "problem": "How many?", "solution": "3"},
    "clevr-r1": {"image": "a.png", "problem": "How many?", "solution": "3", "thinking": "<think>I count.</think>"},
    "hallusionbench": HALLUSION,
}
FOLDER: dict[str, bytes | Link] = {
    "outside.png": images()["a.png"],
    "in/out-link.png": Link("../outside.png"),
    "in/loop.png": Link("loop.png"),
    "in/folder/x": b"",
}


def _folder(extra: dict[str, bytes]) -> dict[str, bytes | Link]:
    return FOLDER | {f"in/{name}": data for name, data in images().items()} | {f"in/{k}": v for k, v in extra.items()}


def _prepare(name: str, source: str, file: str, content: bytes, *more: str) -> Case:
    argv = ["prepare-data", source, "--input", f"in/{file}", "--out", "out", "--json", *more]
    return Case(name, argv, _folder({file: content}), out="out", names=(file, "in", source))


def _lines(records: list) -> bytes:
    return b"".join(values.as_json(r) + b"\n" for r in records)


@st.composite
def _records(draw) -> Case:
    source = draw(st.sampled_from(list(BASES)))
    base = BASES[source]
    records = []
    for _ in range(draw(st.integers(1, 4))):
        record = draw(st.one_of(values.changed(base), st.just(base), values.values))
        if isinstance(record, dict) and "image" in record and draw(st.booleans()):
            record = record | {"image": draw(st.sampled_from(NAMES))}
        records.append(record)
    kind = draw(st.sampled_from(("jsonl", "json", "damaged", "csv", "folder")))
    more = draw(st.sampled_from(([], ["--limit", "2"], ["--split", "train"], ["--images", "in"])))
    if kind == "json":
        return _prepare("records", source, "rows.json", values.as_json(records), *more)
    content = _lines(records)
    if kind == "damaged":
        content = draw(values.damaged(content))
    if kind == "csv":
        head = ",".join(base)
        content = (
            head
            + "\n"
            + "\n".join(",".join(str(v) for v in r.values()) if isinstance(r, dict) else str(r) for r in records)
        ).encode("utf-8", "surrogatepass")
    name = {"csv": "metadata.csv", "folder": "train/metadata.jsonl"}.get(kind, "rows.jsonl")
    case = _prepare("records", source, name, content, *more)
    if kind == "folder":
        case.argv[3] = "in"
    return case


records = _records()


@st.composite
def _images(draw) -> Case:
    data = draw(values.damaged(draw(st.sampled_from(list(images().values())))))
    names = {"x.png": data} | {
        f"y{i}.jpg": draw(values.damaged(images()[n]))
        for i, n in enumerate(draw(st.lists(st.sampled_from(list(images())), max_size=3)))
    }
    content = _lines(
        [RECORD | {"id": str(i), "image": n} for i, n in enumerate([*names, "a.png"][: draw(st.integers(1, 5))])]
    )
    return _prepare("images", "jsonl", "rows.jsonl", content) if not names else Case(
        "images", ["prepare-data", "jsonl", "--input", "in/rows.jsonl", "--out", "out", "--json"],
        _folder({"rows.jsonl": content} | names), out="out", names=("jsonl",),
    )  # fmt: skip


pictures = _images()


# --- parquet ---------------------------------------------------------------------------------------------------

_ROW = {
    "id": "1",
    "images": [{"bytes": images()["a.png"], "path": None}],
    "problem": "What?",
    "solution": "red",
    "thinking": None,
    "source": "x",
}
_TYPES = {
    "texts": lambda n: pa.array(["x"] * n),
    "numbers": lambda n: pa.array([1.5] * n),
    "nulls": lambda n: pa.nulls(n),
    "null texts": lambda n: pa.nulls(n, pa.string()),
    "bytes": lambda n: pa.array([b"\xff\xfe"] * n),
    "lists of texts": lambda n: pa.array([["a.png"]] * n),
    "empty lists": lambda n: pa.array([[]] * n, pa.list_(pa.binary())),
    "lists of nulls": lambda n: pa.array([[None]] * n, pa.list_(pa.binary())),
    "null lists": lambda n: pa.nulls(n, pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    "bytes that are no text": lambda n: pa.array([b"\xff\xfe"] * n, pa.binary()).view(pa.string()),
    "dates": lambda n: pa.array([2**62] * n, pa.timestamp("us")),
    "maps": lambda n: pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int64())),
    "structs": lambda n: pa.array([{"bytes": images()["a.png"], "path": "/etc/hostname"}] * n),
    "paths in structs": lambda n: pa.array([[{"bytes": None, "path": "/etc/hostname"}]] * n, pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    "decimals": lambda n: pa.array([1] * n, pa.int64()).cast(pa.decimal128(20)),
    "broken images": lambda n: pa.array([[images()["truncated.png"]]] * n, pa.list_(pa.binary())),
    "texts as images": lambda n: pa.array([[b"text"]] * n, pa.list_(pa.binary())),
    "bombs": lambda n: pa.array([[bomb()]] * n, pa.list_(pa.binary())),
    "single pixels": lambda n: pa.array([[images()["pixel.png"]]] * n, pa.list_(pa.binary())),
}  # fmt: skip


def table(rows: int = 2, **columns) -> pa.Table:
    """Rows as prepare-data writes them, with some columns replaced (None: left out)."""
    from r1vfree_cli.data.prepare import arrow_schema

    found = pa.Table.from_pylist([_ROW | {"id": str(i)} for i in range(rows)], schema=arrow_schema())
    found = found.replace_schema_metadata(None)
    for name, column in columns.items():
        if name in found.column_names:
            found = found.drop_columns([name])
        if column is not None:
            found = found.append_column(name, column)
    return found


def parquet(data: pa.Table, **options) -> bytes:
    out = io.BytesIO()
    pq.write_table(data, out, **options)
    return out.getvalue()


def _load(path: str):
    """Load rows as a training run does: lengths are read from image headers, the first rows are decoded."""

    def call() -> None:
        from r1vfree_cli.data.load import load_rows

        for row in load_rows(path):
            assert all(image.size for image in row["images"])

    return call


def _parquet_cases(name: str, content: bytes) -> list[Case]:
    files: dict[str, bytes | Link] = {"in/train-00000.parquet": content}
    recipe = {"r.yaml": dumped(GRPO | {"data": {"path": "in"}})}
    names = ("train-00000.parquet", "in", "parquet")
    return [
        Case(f"prepare {name}", ["prepare-data", "parquet", "--input", "in/train-00000.parquet", "--out", "out", "--json"], files, out="out", names=names),
        Case(f"check {name}", ["grpo", "--recipe", "r.yaml", "--dry-run", "--json"], files | recipe, names=names),
        Case(f"load {name}", [], files, names=names, call=_load("in")),
    ]  # fmt: skip


@st.composite
def _parquet_files(draw) -> Case:
    columns = draw(
        st.dictionaries(
            st.sampled_from(("id", "images", "problem", "solution", "thinking", "source", "image", "question")),
            st.sampled_from([None, *_TYPES]),
            min_size=1,
            max_size=3,
        )
    )
    rows = draw(st.sampled_from((0, 1, 3)))
    try:
        content = parquet(table(rows, **{k: None if v is None else _TYPES[v](rows) for k, v in columns.items()}))
    except pa.ArrowException:  # no columns are left
        content = b"PAR1"
    if draw(st.integers(0, 2)) == 0:
        content = draw(values.damaged(content))
    return draw(st.sampled_from(_parquet_cases(f"parquet {columns}", content)))


parquets = _parquet_files()

_PREPARED = {"schema_version": 1, "source": "jsonl", "splits": {"train": {"rows": 2, "sha256": "0" * 64, "solution": 2, "thinking": 0,
             "files": [{"name": "train-00000.parquet", "rows": 2, "bytes": 0, "sha256": "0" * 64}]}}, "sha256": "0" * 64}  # fmt: skip


@cache
def prepared() -> dict:
    """data.json that fits `table()`."""
    return values.put(_PREPARED, ("splits", "train", "files", 0, "bytes"), len(parquet(table())))


def _summary_case(content: bytes) -> Case:
    files: dict[str, bytes | Link] = {"in/train-00000.parquet": parquet(table()), "in/data.json": content}
    return Case("data.json", [], files, names=("in",), call=_loaded_and_hashed)


def _loaded_and_hashed() -> None:
    from r1vfree_cli.data.load import data_sha256

    _load("in")()
    assert isinstance(data_sha256("in"), str)


summaries = values.document_files(prepared()).map(_summary_case)
paths = st.one_of(st.sampled_from(values.SPECIAL_TEXTS), st.text(max_size=10), st.sampled_from(["r.yaml", ".", "..", "/", "/dev/null", "~x"])).map(
    lambda p: Case("data.path", ["grpo", "--recipe", "r.yaml", "--dry-run", "--json"], {"r.yaml": dumped(GRPO | {"data": {"path": p}})}, names=("data", "r.yaml"))
)  # fmt: skip
cases = st.one_of(records, records, pictures, parquets, summaries, paths)

HAND = [
    _prepare("every kind of image", "jsonl", "rows.jsonl", _lines([RECORD | {"id": str(i), "image": n} for i, n in enumerate(NAMES)])),
    *(_prepare(f"only {n[:20]!r}", "jsonl", "rows.jsonl", _lines([RECORD | {"image": n}])) for n in NAMES),
    *(_prepare(f"{name} as {source}", source, "rows.jsonl", content)
      for source in ("jsonl", "rlhf-v", "hallusionbench")
      for name, content in {"nothing": b"", "lines of white space": b" \n\t\n", "numbers": b"1\n2\n", "deep JSON": values.deep_json() + b"\n",
                            "a list": b"[1, 2]", "an open list": b"[{", "UTF-16": '{"id": 1}'.encode("utf-16"), "NUL": b"\x00" * 100,
                            "a byte order mark": b"\xef\xbb\xbf" + _lines([BASES[source]])}.items()),
    *(c for name, make in _TYPES.items() for c in _parquet_cases(f"{name} as images", parquet(table(images=make(2))))),
    *(c for name, make in _TYPES.items() for c in _parquet_cases(f"{name} as problem", parquet(table(problem=make(2))))[2:]),
    *(c for name, content in {"an empty file": b"", "the first half": parquet(table())[:300], "only magic": b"PAR1PAR1", "no rows": parquet(table(0)),
                              "no image column": parquet(table(images=None)), "a torn page": parquet(table(50), use_dictionary=False).replace(b"What?", b"\xff\xff\xff\xff\xff"),
                              "a text file": b"id,problem\n1,2\n"}.items() for c in _parquet_cases(name, content)),
    _summary_case(values.as_json(prepared())),
    Case("a source that is a folder of nothing", ["prepare-data", "parquet", "--input", "in", "--out", "out"], {"in/x.txt": b""}, out="out", names=("in",)),
    Case("out is a file", ["prepare-data", "shapes", "--out", "out", "--limit", "3"], {"out": b"mine"}, names=("out",), codes=(2,)),
    Case("out is full", ["prepare-data", "shapes", "--out", "out", "--limit", "3"], {"out/mine.txt": b"mine"}, names=("out",), codes=(2,)),
    Case("out is under a file", ["prepare-data", "shapes", "--out", "f/out", "--limit", "3"], {"f": b"mine"}, names=("f/out",), codes=(2,)),
    Case("out is a dangling link", ["prepare-data", "shapes", "--out", "out", "--limit", "3"], {"out": Link("gone/gone")}, names=("out",)),
    Case("out as long as no file's", ["prepare-data", "shapes", "--out", "x" * 5000, "--limit", "3"], names=("xxx",), codes=(2,)),
    Case("no source", ["prepare-data", "shape", "--out", "out"], names=("shape",), codes=(2,), out="out"),
    Case("a limit of nothing", ["prepare-data", "shapes", "--out", "out", "--limit", "0"], names=("limit",), codes=(2,), out="out"),
    Case("a huge limit of few", ["prepare-data", "jsonl", "--input", "in/rows.jsonl", "--out", "out", "--limit", "9" * 30, "--json"], _folder({"rows.jsonl": _lines([RECORD])}), out="out"),
    Case("a negative seed", ["prepare-data", "shapes", "--out", "out", "--limit", "2", "--seed", "-5", "--json"], out="out"),
    Case("no such split", ["prepare-data", "jsonl", "--input", "in/rows.jsonl", "--split", "nope", "--out", "out"], _folder({"rows.jsonl": _lines([RECORD])}), out="out", names=("nope",), codes=(2,)),
    Case("input as long as no file's", ["prepare-data", "jsonl", "--input", "x" * 5000, "--out", "out"], names=("xxx",), codes=(2,)),
    Case("images as long as no file's", ["prepare-data", "jsonl", "--input", "in/rows.jsonl", "--images", "x" * 5000, "--out", "out"], _folder({"rows.jsonl": b""}), names=("xxx",), codes=(2,)),
]  # fmt: skip
