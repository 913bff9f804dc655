"""Files that other tools wrote: each layout gives the scores of the official one, and what fits none is told so."""

from __future__ import annotations

import csv
import json
import random
import shutil
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from test_hallusion import records

from r1vfree_cli.core.errors import DataError
from r1vfree_cli.core.files import read_json, write_json
from r1vfree_cli.eval.hallusion import score
from r1vfree_cli.eval.options import EvalOptions
from r1vfree_cli.eval.runner import evaluate
from r1vfree_cli.eval.show import print_scores

REAL = Path(__file__).parents[3] / "shared" / "hallusionbench" / "HallusionBench.json"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_CACHE", str(tmp_path / "cache"))


REPLIES = [
    "Yes",
    "No",
    "Yes, there is.",
    "No.\nNone at all & <none>",
    "hm",
    "I would say no here",
    "No image provided.",
    "<think>no</think>yes",
]


def answered(rows: list[dict]) -> list[dict]:
    rng = random.Random(0)
    return [r | {"model_prediction": rng.choice(REPLIES)} for r in rows]


def images_only() -> list[dict]:
    return answered([r for r in records() if r["visual_input"] != "0"])


def of_vlmevalkit(rows: list[dict]) -> list[dict]:
    names = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id")
    return [
        {
            "index": "_".join(r[n] for n in names),
            "question": r["question"],
            "answer": ("No", "Yes")[int(r["gt_answer"])],
            "category": r["category"],
            "l2-category": f"{r['category']}_{r['subcategory']}",
            "prediction": r["model_prediction"],
        }
        for r in rows
    ]


def table(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def sheet(path: Path, rows: list[dict], inline: bool = False) -> Path:
    """A workbook: strings shared as Excel and pandas write them, or in the cells; empty cells are left out."""
    shared: list[str] = []

    def cell(place: str, value) -> str:
        if value is None:
            return ""
        text = f'<t xml:space="preserve">{escape(str(value))}</t>'
        if inline:
            return f'<c r="{place}" t="inlineStr"><is>{text}</is></c>'
        shared.append(f"<si>{text}</si>" if len(shared) % 2 else f"<si><r>{text}</r><rPh><t>x</t></rPh></si>")
        return f'<c r="{place}" t="s"><v>{len(shared) - 1}</v></c>'

    body = ""
    for number, row in enumerate([list(rows[0]), *(r.values() for r in rows)], 1):
        body += f'<row r="{number}">' + "".join(cell(f"{chr(65 + i)}{number}", v) for i, v in enumerate(row)) + "</row>"
    name = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("xl/worksheets/hidden.xml", f"<worksheet {name}><sheetData/></worksheet>")  # not the first sheet
        z.writestr("xl/worksheets/A.xml", f"<worksheet {name}><sheetData/></worksheet>")
        z.writestr("xl/worksheets/sheet1.xml", f"<worksheet {name}><sheetData>{body}</sheetData></worksheet>")
        z.writestr("xl/sharedStrings.xml", f"<sst {name}>{''.join(shared)}</sst>")
    return path


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def write(path: Path, document) -> Path:
    write_json(path, document)
    return path


def logged(r: dict, i: int, doc: bool) -> dict:
    sample = {k: v for k, v in r.items() if k != "model_prediction"}
    found = {"doc_id": i, "target": r["gt_answer_details"], "filtered_resps": [r["model_prediction"]], "doc_hash": "x"}
    return found | (
        {"doc": sample, "resps": [[r["model_prediction"]]]} if doc else {m: r for m in ("aAcc", "qAcc", "fAcc")}
    )


LAYOUTS = {
    "official list": lambda d, rows: write(d / "p.json", rows),
    "two files": lambda d, rows: [write(d / f"{c}.json", [r for r in rows if r["category"] == c]) for c in ("VD", "VS")],
    "lines": lambda d, rows: write_lines(d / "p.jsonl", rows),
    "lines as json": lambda d, rows: write_lines(d / "p.json", rows),
    "lines as txt": lambda d, rows: write_lines(d / "p.txt", rows),
    "lines without a suffix": lambda d, rows: write_lines(d / "predictions", rows),
    "Yes and No in the key": lambda d, rows: write(d / "p.json", [r | {"gt_answer": ("No", "Yes")[int(r["gt_answer"])]} for r in rows]),
    "booleans in the key": lambda d, rows: write(d / "p.json", [r | {"gt_answer": r["gt_answer"] == "1"} for r in rows]),
    "numbers": lambda d, rows: write(d / "p.json", [r | {"set_id": int(r["set_id"]), "gt_answer": float(r["gt_answer"])} for r in rows]),
    "official xlsx": lambda d, rows: sheet(d / "p.xlsx", rows),
    "vlmevalkit xlsx": lambda d, rows: sheet(d / "m_HallusionBench.xlsx", of_vlmevalkit(rows)),
    "vlmevalkit xlsx inline": lambda d, rows: sheet(d / "m.xlsx", of_vlmevalkit(rows), inline=True),
    "vlmevalkit tsv": lambda d, rows: table(d / "m.tsv", of_vlmevalkit(rows)),
    "vlmevalkit csv": lambda d, rows: table(d / "m.csv", of_vlmevalkit(rows)),
    "a tsv called csv, other capitals": lambda d, rows: Path(shutil.move(table(d / "m.tsv", [{k.title(): v for k, v in r.items()} for r in of_vlmevalkit(rows)]), d / "m.csv")),
    "official with prediction": lambda d, rows: write(d / "p.json", [{k.replace("model_", ""): v for k, v in r.items()} for r in rows]),
    "vlmevalkit json": lambda d, rows: write(d / "m.json", of_vlmevalkit(rows)),
    "vlmevalkit lines": lambda d, rows: write_lines(d / "m.json", of_vlmevalkit(rows)),
    "vlmevalkit columns": lambda d, rows: write(d / "m.json", {k: {str(i): r[k] for i, r in enumerate(of_vlmevalkit(rows))} for k in of_vlmevalkit(rows)[0]}),
    "vlmevalkit by index": lambda d, rows: write(d / "m.json", {r["index"]: {k: r[k] for k in ("question", "answer", "prediction")} for r in of_vlmevalkit(rows)}),
    "lmms-eval samples": lambda d, rows: write_lines(d / "samples.jsonl", [logged(r, i, False) for i, r in enumerate(rows)]),
    "lmms-eval samples with doc": lambda d, rows: write_lines(d / "samples.jsonl", [logged(r, i, True) for i, r in enumerate(rows)]),
    "lmms-eval log": lambda d, rows: write(d / "log.json", {"args": {}, "logs": [logged(r, i, True) for i, r in enumerate(rows)], "time": 1}),
}  # fmt: skip


OF_EACH_TOOL = ("two files", "official xlsx", "vlmevalkit xlsx", "vlmevalkit by index", "lmms-eval samples with doc")


@pytest.mark.parametrize(
    ("layout", "with_questions"), [*((n, False) for n in LAYOUTS), *((n, True) for n in OF_EACH_TOOL)]
)
def test_every_layout_gives_the_same_scores(layout, with_questions, tmp_path):
    rows = images_only()
    questions = str(write(tmp_path / "q.json", records())) if with_questions else None
    wanted = evaluate(
        EvalOptions(predictions=write(tmp_path / "w.json", rows), protocol="vlmevalkit", out=tmp_path / "w")
    )
    doc = evaluate(
        EvalOptions(predictions=LAYOUTS[layout](tmp_path, rows), protocol="vlmevalkit", questions=questions, out=tmp_path / "e")
    )  # fmt: skip
    for key in ("counts", "diagnostics", "by_subcategory", "answer_format", "mean"):
        assert doc[key] == wanted[key], key
    kept = read_json(tmp_path / "e" / "judged.json")  # in the official form whoever wrote the file
    assert {r["question_id"] for r in kept} <= {"0", "1", "2"} and score.from_record(kept[0], "").code in (0, 1, 2)


def test_the_two_files_of_the_official_script_are_one_result(tmp_path):
    rows = [r | {score.CODE: str(i % 3), score.SAME: "1", "correct": i % 2} for i, r in enumerate(answered(records()))]
    one = evaluate(EvalOptions(judged=write(tmp_path / "all.json", rows)))
    two = [
        write(tmp_path / f"hallusion_output_{c}_model.json", [r for r in rows if r["category"].lower() == c])
        for c in ("vd", "vs")
    ]
    doc = evaluate(EvalOptions(judged=two, out=tmp_path / "e"))
    assert doc["counts"] == one["counts"] and doc["diagnostics"] == one["diagnostics"]
    assert all(str(f) in doc["settings"]["judged"] for f in two)
    with pytest.raises(DataError, match="duplicate"):
        evaluate(EvalOptions(judged=[two[0], two[0]]))
    from typer.testing import CliRunner

    from r1vfree_cli import cli

    called = CliRunner().invoke(cli.app, ["eval-hallusion", "--judged", str(two[0]), "--judged", str(two[1]), "--json"])
    assert json.loads(called.stdout)["counts"] == one["counts"], called.output


def test_a_sample_without_an_answer_key_takes_it_from_the_questions_and_says_what_it_is_about(tmp_path, capsys):
    """As the authors' result sample: some questions, no gt_answer, no filename, white space of its own in the texts."""
    keyless = [
        {k: v for k, v in r.items() if k not in ("gt_answer", "filename")} | {"question": r["question"].replace(" ", "  ", 1) + " "}
        for r in answered(records())[:9]
    ]  # fmt: skip
    file, questions = write(tmp_path / "sample.json", keyless), str(write(tmp_path / "q.json", records()))
    with pytest.raises(DataError, match="no gt_answer") as e:
        evaluate(EvalOptions(predictions=file, out=tmp_path / "a"))
    assert "--questions" in (e.value.hint or "")
    doc = evaluate(EvalOptions(predictions=file, questions=questions, out=tmp_path / "a"))
    assert doc["n_questions"] == 9 and any("9 of the 22 questions" in w for w in doc["warnings"])
    print_scores(doc)
    assert "9 of the 22 questions" in capsys.readouterr().err
    again = evaluate(EvalOptions(out=tmp_path / "a", stage="score"))
    assert again["counts"] == doc["counts"] and any("9 of the 22 questions" in w for w in again["warnings"])
    judged = write(tmp_path / "judged.json", [r | {score.CODE: "1"} for r in keyless])
    doc = evaluate(EvalOptions(judged=judged, questions=questions, allow_unjudged=True))
    assert doc["counts"]["aAcc"] == [9, 9] and any("9 of the 22 questions" in w for w in doc["warnings"])
    other = write(tmp_path / "other.json", [keyless[0] | {"question": "Is it another question?"}, *keyless[1:]])
    with pytest.raises(DataError, match="another text"):
        evaluate(EvalOptions(predictions=other, questions=questions, out=tmp_path / "b"))
    with_key = write(tmp_path / "key.json", answered(records())[:9])  # a file cut off is not a sample
    with pytest.raises(DataError, match="13 questions have no prediction"):
        evaluate(EvalOptions(predictions=with_key, questions=questions, out=tmp_path / "b"))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([{"id": 1, "text": "Yes"}], "found: id, text"),
        ([{"index": 7, "prediction": "Yes"}], "index is 7"),
        ([{"question": "Is it?", "prediction": "Yes"}], "found: question, prediction"),
        ({"a": 1, "b": 2}, "an object with a, b"),
        ([1, 2], "expected an object, found int"),
        ("Yes", "found str"),
        ([{}], "found: nothing"),
        ([{"set_id": 1, "figure_id": 2}], "no category"),
        ([{"response": "Yes"} | {k: v for k, v in records()[0].items() if v}], "found: response, category"),
    ],
)  # fmt: skip
def test_what_fits_no_layout_is_told_what_it_has_and_what_is_accepted(content, found, tmp_path):
    with pytest.raises(DataError) as e:
        evaluate(EvalOptions(predictions=write(tmp_path / "p.json", content), out=tmp_path / "e"))
    text = "\n".join([e.value.message, *e.value.details])
    assert e.value.exit_code == 3 and found in text and str(tmp_path / "p.json") in text
    if isinstance(content, list) and isinstance(content[0], dict) and "set_id" not in content[0]:
        assert all(word in text for word in ("accepted", "VLMEvalKit", "lmms-eval", "official"))


@pytest.mark.parametrize("data", [b"PK\3\4 no zip", b"", b"\xff\xfe[", b"index\tprediction"])
def test_damaged_files_are_data_errors(data, tmp_path):
    for name in ("p.xlsx", "p.tsv", "p.json"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Exception) as e:
            evaluate(EvalOptions(predictions=tmp_path / name, out=tmp_path / "e"))
        assert getattr(e.value, "exit_code", None) in (2, 3), e.value


def test_a_call_that_failed_elsewhere_is_an_empty_reply(tmp_path):
    rows = [r | {"prediction": "Failed to obtain answer via API."} for r in of_vlmevalkit(images_only())]
    with pytest.raises(DataError, match="18 of 18 replies are empty"):
        evaluate(EvalOptions(predictions=table(tmp_path / "m.tsv", rows), protocol="vlmevalkit", out=tmp_path / "e"))


def test_the_reader_of_vlmevalkit_reads_replies_as_they_are(tmp_path):
    """Its rule: "yes" or "no" among the words of the whole reply, an image that is missing included."""
    rows = [
        r | {"model_prediction": reply}
        for r, reply in zip(images_only(), ["<think>no</think><answer>yes</answer>", "No image provided.", "Yes"] * 6)
    ]
    file = write(tmp_path / "p.json", rows)
    own, theirs = (
        evaluate(EvalOptions(predictions=file, protocol="vlmevalkit", reader=r, out=tmp_path / r)) for r in ("r1v", "vlmevalkit")
    )  # fmt: skip
    yes = [r["gt_answer"] == "1" for r in rows]
    assert own["counts"]["aAcc"][0] == sum(y for i, y in enumerate(yes) if i % 3 != 1)
    assert theirs["counts"]["aAcc"][0] == sum((i % 3 == 1) != y for i, y in enumerate(yes) if i % 3)
    assert (
        own["answer_format"]["unreadable_share"]
        == theirs["answer_format"]["unreadable_share"]
        == pytest.approx(1 / 3, abs=0.03)
    )
    assert theirs["settings"]["judge"] == {"kind": "rule", "judge_input": "reply", "reader": "vlmevalkit"}
    compared = evaluate(
        EvalOptions(predictions=file, protocol="vlmevalkit", out=tmp_path / "c", compare_to=tmp_path / "vlmevalkit")
    )
    assert any("judged differently" in w for w in compared["warnings"])


@pytest.mark.skipif(not REAL.is_file(), reason="the real questions are not beside the checkout")
def test_real_questions_in_every_layout(tmp_path):
    rows = answered(json.loads(REAL.read_text(encoding="utf-8")))
    doc = evaluate(EvalOptions(predictions=write(tmp_path / "p.json", rows), out=tmp_path / "a"))
    assert {m: total for m, (_, total) in doc["counts"].items()} == score.OFFICIAL_COUNTS and not doc["warnings"]
    images = [r for r in rows if str(r["visual_input"]) != "0"]
    files = [
        sheet(tmp_path / "m.xlsx", of_vlmevalkit(images)),
        write_lines(tmp_path / "s.jsonl", [logged(r, 0, False) for r in images]),
    ]
    both = [evaluate(EvalOptions(predictions=f, protocol="vlmevalkit", out=tmp_path / f.stem)) for f in files]
    assert both[0]["counts"] == both[1]["counts"] and both[0]["counts"]["aAcc"][1] == 951 and not both[0]["warnings"]
