"""HallusionBench files that are wrong: judged files, predictions, questions, figures, and eval dirs to go on with."""

from __future__ import annotations

import base64
import io
import zipfile
from dataclasses import replace

from hypothesis import strategies as st

from . import values
from .data import images, pa, parquet
from .harness import Case, Link

KEYS = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id")
ASKED = [
    {
        **dict(
            zip(
                KEYS,
                (category, "figure", "0" if category == "VS" and f == 0 else str(f + 1), "0", str(f), str(q)),
                strict=True,
            )
        ),
        "question": f"Is it {q}?",
        "gt_answer": str((f + q) % 2),
        "gt_answer_details": "details",
        "filename": None if category == "VS" and f == 0 else f"./{category}/figure/0_{f}.png",
    }
    for category in ("VD", "VS")
    for f in range(2)
    for q in range(2)
]
PREDICTED = [q | {"model_prediction": "<think>x</think><answer>Yes</answer>"} for q in ASKED]
JUDGED = [q | {"gpt4v_output_gpt_check": "1", "same": "1"} for q in PREDICTED]
FIGURES = {f"fig/{c}/figure/0_{f}.png": images()["a.png"] for c in ("VD", "VS") for f in range(2)}


def _lines(records: list) -> bytes:
    return b"".join(values.as_json(r) + b"\n" for r in records)


def _judged(content: bytes, file: str = "judged.json", *more: str) -> Case:
    argv = ["eval-hallusion", "--judged", file, "--json", *more]
    return Case(
        "a judged file",
        argv,
        {file: content},
        out="out" if "--out" in more else None,
        names=(file,),
        keeps=("out",) if "--out" in more else (),
    )


def _predicted(content: bytes, file: str = "p.json", questions: bytes | None = None, *more: str) -> Case:
    argv = ["eval-hallusion", "--predictions", file, "--out", "out", "--json", *more]
    files: dict[str, bytes | Link] = {file: content}
    if questions is not None:
        argv += ["--questions", "q.json"]
        files["q.json"] = questions
    return Case("a prediction file", argv, files, names=(file, "q.json"), out="out")


def _elsewhere(content: bytes, file: str = "p.json") -> Case:
    """Another tool's predictions; a score that is refused because many are empty keeps what it was about."""
    return replace(_predicted(content, file), names=(file, "replies are empty"), keeps=("out",))


def _files(document: list) -> st.SearchStrategy[tuple[str, bytes]]:
    lines = st.one_of(
        st.just(document).map(_lines), values.changed(document).filter(lambda d: isinstance(d, list)).map(_lines)
    ).flatmap(values.damaged)
    return st.one_of(values.document_files(document).map(lambda b: ("f.json", b)), lines.map(lambda b: ("f.jsonl", b)))


def _tsv() -> bytes:
    image = base64.b64encode(images()["a.png"]).decode()
    rows = ["index\tquestion\tanswer\timage\tcategory"]
    rows += [
        f"VD_figure_{f + 1}_0_{f}_{q}\tIs it {q}?\t{'Yes' if q else 'No'}\t{image}\tVD"
        for f in range(2)
        for q in range(2)
    ]
    return "\n".join(rows).encode()


def _question_parquet() -> bytes:
    rows = [
        {k: v for k, v in q.items() if k != "filename"} | {"image": {"bytes": images()["a.png"], "path": None}}
        for q in ASKED
    ]
    return parquet(pa.Table.from_pylist(rows))


# As other tools write them: VLMEvalKit's predictions, lmms-eval's sample logs.
_ELSEWHERE = [
    {"index": "_".join(q[k] for k in KEYS), "question": q["question"], "answer": "Yes", "prediction": "Yes"}
    for q in ASKED
]
_LOGGED = [{"doc_id": 0, "filtered_resps": ["Yes"], "doc": q, "aAcc": p} for q, p in zip(ASKED, PREDICTED, strict=True)]


def _workbook(rows: list[dict]) -> bytes:
    cells = [
        [f'<c t="inlineStr"><is><t>{v}</t></is></c>' for v in row] for row in [rows[0], *(r.values() for r in rows)]
    ]
    data = "".join(f"<row>{''.join(row)}</row>" for row in cells)
    return zipped({"xl/worksheets/sheet1.xml": f'<w xmlns="x"><sheetData>{data}</sheetData></w>'.encode()})


ESTIMATE = ["--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--estimate", "--json"]


def _asked(file: str, content: bytes, figures: dict[str, bytes | Link] | None = None, *more: str) -> Case:
    """Figures are opened and counted for an estimate; nothing is asked."""
    argv = ["eval-hallusion", *ESTIMATE, "--questions", file.split("/")[0], *(more or ("--images", "fig"))]
    return Case(
        "a question file",
        argv,
        {file: content} | (FIGURES if figures is None else figures),
        names=(file, "fig", "q", "figure"),
    )


def zipped(names: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    return out.getvalue()


_IN_ZIP = {name.removeprefix("fig/"): data for name, data in FIGURES.items()}
_JUDGED_LINES = [
    {"id": "_".join(str(q[k]) for k in (*KEYS[:2], *KEYS[3:])), "key": "k", "code": 1, "same": 1} for q in ASKED
]
_PREDICTED_LINES = [{"id": j["id"], "key": "k", **p} for j, p in zip(_JUDGED_LINES, PREDICTED, strict=True)]
_STATE = {"schema": 1, "identity": {"model": "m", "protocol": "official"}, "times": {}, "asked": {"n": 8}, "judge": {"kind": "rule", "judge_input": "answer"},
          "warnings": [], "runtime": {}}  # fmt: skip
EVAL_DIR = {
    "out/eval.json": values.as_json(_STATE),
    "out/predictions.jsonl": _lines(_PREDICTED_LINES),
    "out/judgements.jsonl": _lines(_JUDGED_LINES),
}


def _going_on(name: str, content: bytes, stage: str) -> Case:
    argv = ["eval-hallusion", "--stage", stage, "--out", "out", "--json"]
    # The earlier stages' files are this stage's to bring up to date; predictions.jsonl is not.
    mine = ("out/eval.json", "out/judg", "out/scores.json")
    return Case(f"an eval dir, {stage}", argv, EVAL_DIR | {name: content}, names=("out",), keeps=mine)


def _eval_dirs() -> st.SearchStrategy[Case]:
    parts = {
        "out/eval.json": values.document_files(_STATE),
        "out/predictions.jsonl": st.one_of(values.damaged(EVAL_DIR["out/predictions.jsonl"]), values.changed(_PREDICTED_LINES).filter(lambda d: isinstance(d, list)).map(_lines)),
        "out/judgements.jsonl": st.one_of(values.damaged(EVAL_DIR["out/judgements.jsonl"]), values.changed(_JUDGED_LINES).filter(lambda d: isinstance(d, list)).map(_lines)),
    }  # fmt: skip
    return st.one_of(
        *(st.builds(_going_on, st.just(n), c, st.sampled_from(("judge", "score"))) for n, c in parts.items())
    )


OPTIONS = ("--limit", "--batch-size", "--max-new-tokens", "--temperature", "--min-pixels", "--max-pixels", "--concurrency", "--timeout", "--max-retries",
           "--seed", "--fail-under", "--protocol", "--judge", "--judge-input", "--stage", "--device", "--compare-to", "--judge-prompt", "--revision", "--base")  # fmt: skip
options = st.lists(
    st.tuples(st.sampled_from(OPTIONS), st.one_of(values.scalars.map(str), st.sampled_from(["aAcc=50", "aAcc=nan", "aAcc", "=1", "rule", "chat", "nan", "inf", "-1"]))),
    min_size=1,
    max_size=3,
).filter(lambda pairs: not any("\x00" in v for _, v in pairs)).map(
    lambda pairs: Case(
        "options", ["eval-hallusion", "--judged", "judged.json", "--json", *(f"{k}={v}" for k, v in pairs)], {"judged.json": values.as_json(JUDGED)}, codes=(0, 2, 3, 4)
    )
)  # fmt: skip

cases = st.one_of(
    _files(JUDGED).map(lambda f: _judged(f[1], f[0])),
    _files(JUDGED).map(lambda f: _judged(f[1], f[0], "--out", "out")),
    _files(PREDICTED).map(lambda f: _predicted(f[1], f[0])),
    st.tuples(_files(PREDICTED), values.document_files(ASKED)).map(lambda t: _predicted(t[0][1], t[0][0], t[1])),
    values.changed(_ELSEWHERE).map(lambda d: _elsewhere(values.as_json(d))),
    values.changed(_LOGGED).map(lambda d: _elsewhere(values.as_json(d))),
    st.builds(
        _elsewhere,
        values.damaged(_workbook(_ELSEWHERE)),
        st.sampled_from(("p.xlsx", "p.json")),
    ),
    values.damaged(_tsv().replace(b"image", b"prediction")).map(lambda b: _elsewhere(b, "p.tsv")),
    values.document_files(ASKED).map(lambda b: _asked("q.json", b)),
    values.damaged(_tsv()).map(lambda b: _asked("q.tsv", b)),
    values.damaged(_question_parquet()).map(lambda b: _asked("q/test.parquet", b)),
    values.damaged(zipped(_IN_ZIP)).map(
        lambda b: _asked("q.json", values.as_json(ASKED), {"fig.zip": b}, "--images", "fig.zip")
    ),
    values.damaged(images()["a.png"]).map(
        lambda b: _asked("q.json", values.as_json(ASKED), FIGURES | {"fig/VD/figure/0_0.png": b})
    ),
    _eval_dirs(),
    options,
)

_BOMB = zipped(_IN_ZIP | {"VD/figure/0_0.png": b"\0" * 400_000_000})
HAND = [
    *(_judged(content, file, *more)
      for file in ("judged.json", "judged.jsonl")
      for content in (b"", b"null", b"[]", b"{}", b"[null]", b"[[]]", b"\x00", b"\xff\xfe", b"[" * 50_000, values.as_json(JUDGED)[:-40], values.as_json(JUDGED * 2),
                      values.as_json([JUDGED[0] | {"same": float("nan")}]), values.as_json([JUDGED[0] | {"gt_answer": 10**400}]),
                      values.as_json([JUDGED[0] | {"set_id": "\ud800"}]), values.as_json([JUDGED[0] | {"question_id": "9" * 5000}]), values.as_json([JUDGED[0] | {"figure_id": "\u0660"}]))
      for more in ((), ("--out", "out"))),
    *(_predicted(content, "p.json", questions)
      for content in (b"", b"{}", b"[]", values.as_json(PREDICTED[:-1]), values.as_json(PREDICTED + PREDICTED[:1]), values.as_json([p | {"model_prediction": None} for p in PREDICTED]),
                      values.as_json([p | {"model_prediction": "\ud800"} for p in PREDICTED]), values.as_json([p | {"model_prediction": "x" * 200_000} for p in PREDICTED]),
                      values.as_json([p | {"model_prediction": "<answer>" * 20_000} for p in PREDICTED]), values.as_json([p | {"question": "\ud800"} for p in PREDICTED]),
                      values.as_json(PREDICTED))
      for questions in (None, values.as_json(ASKED), b"[]", values.as_json(ASKED[:3]))),
    *(_elsewhere(content, "p.xlsx") for content in (b"PK", b"PK\3\4", _workbook(_ELSEWHERE), _workbook(_ELSEWHERE)[:-30], zipped({"a": b""}), zipped({"xl/worksheets/s.xml": b"<a"}),
                      zipped({"xl/worksheets/s.xml": b"\0" * 400_000_000}), zipped({"xl/worksheets/s.xml": b'<!DOCTYPE a [<!ENTITY b "' + b"b" * 9999 + b'"><!ENTITY c "' + b"&b;" * 9999
                      + b'">]><w xmlns="x"><sheetData><row><c t="inlineStr"><is><t>&c;</t></is></c></row></sheetData></w>'}),
                      zipped({"xl/worksheets/s.xml": b'<w xmlns="x"><sheetData><row><c t="s"><v>7</v></c></row></sheetData></w>', "xl/sharedStrings.xml": b"<s/>"}),
                      zipped({"xl/worksheets/s.xml": b'<w xmlns="x"><sheetData><row><c r="ZZZZZZZZ1" t="s"><v>-1</v></c></row></sheetData></w>', "xl/sharedStrings.xml": b'<s xmlns="x"/>'}))),
    *(_elsewhere(values.as_json(content)) for content in (_LOGGED, _ELSEWHERE, {"logs": _LOGGED}, {"index": {"0": 1}, "prediction": {"0": 2}}, {"index": [1], "prediction": []}, {"a": {"b": 1}, "c": {}},
                      [{"index": None, "prediction": 1}], [{"aAcc": {"category": []}}], [{"doc": {"category": 1}, "filtered_resps": [[[]]]}], [{"index": "VD_" * 20_000, "prediction": "x"}])),
    *(_asked("q.json", values.as_json([ASKED[0] | {"filename": name}]))
      for name in ("../../VD/figure/0_0.png", "/etc/VD/figure/0_0.png", "VD/figure/../../../x.png", "./VD/figure/0_9.png", "VD/figure/\x00.png", "x" * 5000, "", 7)),
    _asked("q.json", values.as_json(ASKED), FIGURES | {"fig/VD/figure/0_0.png": Link("../../../../outside.png"), "outside.png": images()["a.png"]}),
    _asked("q.json", values.as_json(ASKED), FIGURES | {"fig/VD/figure/0_0.png": Link("0_0.png")}),
    *(_asked("q.json", values.as_json(ASKED), {"fig.zip": content}, "--images", "fig.zip")
      for content in (b"", b"PK", _BOMB, zipped({f"../../{n}": d for n, d in _IN_ZIP.items()}), zipped({f"/{n}": d for n, d in _IN_ZIP.items()}), zipped({}),
                      zipped(_IN_ZIP).replace(images()["a.png"][100:110], b"0123456789"))),
    *(_asked("q.json", values.as_json(ASKED), FIGURES | {"fig/VD/figure/0_0.png": data}) for data in images().values()),
    *(_asked("q.tsv", c) for c in (b"", b"index\n", b"\x00\t\x00\n", b"index\tquestion\n" + b"x" * 300_000, _tsv().replace(b"VD_figure_1", b"VD"), _tsv()[:-50], b'index\t"open\n')),
    *(_asked("q/test.parquet", c) for c in (b"", b"PAR1", _question_parquet()[:200], parquet(pa.table({"a": [1]})), parquet(pa.table({"category": [b"\xff"]})))),
    *(_going_on(name, c, stage) for name in EVAL_DIR for c in (b"", b"[]", b"null", b"7", b"\x00", b'{"id": []}\n', b'{"id": 1, "key": 2, "code": "x", "same": []}\n', values.deep_json())
      for stage in ("judge", "score")),
    *(_going_on("out/predictions.jsonl", values.as_json({"id": id_, "model_prediction": "x"}) + b"\n", stage) for id_ in ({}, [], None, 7) for stage in ("judge", "score")),
    *(Case("a checkpoint of a damaged run", ["eval-hallusion", "run/checkpoints/checkpoint-5", "--questions", "q.json", "--images", "fig", "--estimate", "--json"],
           {"run/recipe.yaml": c, "run/checkpoints/checkpoint-5/config.json": b"{}", "run/checkpoints/checkpoint-5/model.safetensors": b"", "q.json": values.as_json(ASKED)} | FIGURES, names=("recipe.yaml", "max_pixels"))
      for c in (b"", b"[]", b"\xff\xfe", b"model: {max_pixels: x}", b"model: {max_pixels: .inf}", b"model: {max_pixels: 784}", b"&a\nmodel: *a\n", b"[" * 20_000)),
    Case("a folder as judged file", ["eval-hallusion", "--judged", "d", "--json"], {"d/x": b""}, names=("d",)),
    Case("no such file", ["eval-hallusion", "--judged", "x" * 5000, "--json"], names=("xxx",)),
    Case("a judge prompt in another code", ["eval-hallusion", "--predictions", "p.json", "--judge", "chat", "--judge-model", "m", "--judge-prompt", "j.txt", "--out", "out"],
         {"p.json": values.as_json(PREDICTED), "j.txt": b"\xff\xfe"}, names=("j.txt",), keeps=("out",)),
    Case("out is a file", ["eval-hallusion", "--predictions", "p.json", "--out", "out", "--json"], {"p.json": values.as_json(PREDICTED), "out": b"mine"}, names=("out",), codes=(2, 3)),
    Case("out is a file, judged", ["eval-hallusion", "--judged", "p.json", "--out", "out", "--json"], {"p.json": values.as_json(JUDGED), "out": b"mine"}, names=("out",), codes=(2, 3)),
    Case("another evaluation is there", ["eval-hallusion", "--judged", "p.json", "--out", "out", "--json"], {"p.json": values.as_json(JUDGED), **EVAL_DIR, "out/judged.json": b"[]"}, names=("out",), codes=(2,)),
    *(Case("compare-to", ["eval-hallusion", "--judged", "p.json", "--compare-to", "o", "--json"], {"p.json": values.as_json(JUDGED), "o/scores.json": a, "o/judged.json": b}, names=("o",))
      for a in (b"[]", b"null", b"{", b'{"protocol": "official"}', b'{"protocol": "official", "settings": []}', b'{"protocol": "official", "settings": {"judge": [1]}}')
      for b in (b"[]", values.as_json(JUDGED), values.as_json(JUDGED[:2]))),
]  # fmt: skip
