"""Files as users of other trainers have them: layouts by columns, splits by names, several image folders."""

import base64
import csv
import io
import json
import shutil
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data import R1V, picture, rows_of, write_hub_parquet, write_lines

from r1vfree_cli.cli import main
from r1vfree_cli.core.errors import DataError, UsageError
from r1vfree_cli.data import load
from r1vfree_cli.data.prepare import prepare
from r1vfree_cli.data.tables import split_of

PNG = picture(1)
B64 = base64.b64encode(PNG).decode()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R1V_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "in"
    (folder / "coco").mkdir(parents=True)
    for i in range(3):
        (folder / "coco" / f"{i}.png").write_bytes(picture(i))
    return folder


@pytest.fixture
def r1v(monkeypatch):
    """Runs a command in this process; its exit code."""

    def run(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["r1v", *argv])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0)

    return run


def one(out: Path) -> tuple:
    (row,) = rows_of(out)
    return row["problem"], row["solution"], row["thinking"], [image["bytes"] for image in row["images"]]


# --- layouts, as the other tools publish them ------------------------------------------------------------------

TURNS = [
    {"from": "human", "value": "<image>\nWhat is the colour?"},
    {"from": "gpt", "value": "Red."},
    {"from": "human", "value": "And the shape?"},
    {"from": "gpt", "value": "Round."},
]
THOUGHT = "<think>\nI count.\n</think>\n<answer> 3 </answer>"
LAYOUTS = {
    "LLaVA": ({"id": "33471", "image": "coco/1.png", "conversations": TURNS[:2]}, "LLaVA conversations", "Red.", None),
    "VLM-R1": (
        {"id": 1, "image": "coco/1.png", "conversations": [TURNS[0], {"from": "gpt", "value": "<answer>0</answer>"}]},
        "LLaVA conversations", "0", None,
    ),
    "VLM-R1, two columns": (
        {"image": ["coco/1.png"], "problem": "<image>What is the colour?", "solution": "<answer> red </answer>"},
        "problem and solution columns", "red", None,
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "<image>What is the colour?"}, {"from": "gpt", "value": THOUGHT}],
         "images": ["coco/1.png"]},
        "ShareGPT conversations", "3", "I count.",
    ),
    "ShareGPT, pairs": (
        {"conversation": [{"human": "<image>What is the colour?", "assistant": "Red."}], "images": ["coco/1.png"]},
        "ShareGPT conversations", "Red.", None,
    ),
    "OpenAI": (
        {"messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "What is the colour?"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{B64}"}},
            ]},
            {"role": "assistant", "content": "Red."},
        ]},
        "OpenAI messages", "Red.", None,
    ),
    "OpenAI, a question alone": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "coco/1.png"}, {"type": "text", "text": "What is the colour?"}]}],
         "solution": "red"},
        "OpenAI messages", "red", None,
    ),
    "ms-swift": (
        {"messages": [{"role": "user", "content": "<image>What is the colour?"}, {"role": "assistant", "content": "Red."}],
         "images": ["coco/1.png"]},
        "ms-swift messages", "Red.", None,
    ),
    "ms-swift GRPO": (
        {"messages": [{"role": "user", "content": "<image>What is the colour?"}], "images": ["coco/1.png"], "solution": 7},
        "ms-swift messages", "7", None,
    ),
    "ms-swift query": (
        {"query": "<image>What is the colour?", "response": "Red.", "images": ["coco/1.png"], "history": []},
        "ms-swift query and response", "Red.", None,
    ),
    "EasyR1": (
        {"images": [{"bytes": B64}], "problem": "<image>What is the colour?", "answer": "red"},
        "problem and solution columns", "red", None,
    ),
    "verl": (
        {"data_source": "hiyouga/geometry3k", "ability": "math", "images": [{"bytes": B64, "path": None}],
         "prompt": [{"role": "user", "content": "<image>What is the colour? Put the answer in \\boxed{}."}],
         "reward_model": {"style": "rule", "ground_truth": "48"},
         "extra_info": {"split": "train", "index": 0, "answer": "48", "question": "<image>What is the colour?"}},
        "verl prompt", "48", None,
    ),
    "base64": ({"image": B64, "question": "What is the colour?", "answer": "red"}, "problem and solution columns", "red", None),
    "ShareGPT, other roles": (
        {"conversations": [{"from": "Human", "value": "<image>What is the colour?"}, {"from": "chatgpt", "value": "<thinking>I</thinking>Red."}],
         "images": json.dumps(["coco/1.png"])},
        "ShareGPT conversations", "Red.", "I",
    ),
    "OpenAI, places for the images": (
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the colour?"}]}],
         "images": [{"image": "file://coco/1.png"}], "solution": "red"},
        "ms-swift messages", "red", None,
    ),
    "TRL": (
        {"prompt": [{"role": "user", "content": "What is the colour?"}], "completion": [{"role": "assistant", "content": "Red."}],
         "images": [{"url": "coco/1.png"}]},
        "TRL prompt", "Red.", None,
    ),
    "TRL, the better of two, as texts": (
        {"prompt": json.dumps([{"role": "user", "content": "What is the colour?"}]), "images": ["coco/1.png"],
         "chosen": "Red.", "rejected": "Blue."},
        "TRL prompt", "Red.", None,
    ),
    "a prompt and a response": (
        {"prompt": "What is the colour?", "response": "<thought>Fire.</thought>Red.", "image": {"bytes": "", "path": "coco/1.png"}},
        "TRL prompt", "Red.", "Fire.",
    ),
    "a count as the reply": (
        {"image": "coco/1.png", "conversations": [TURNS[0], {"from": "gpt", "value": 3}]}, "LLaVA conversations", "3", None,
    ),
    "Responses API": (
        {"messages": [{"role": "user", "content": [{"type": "input_image", "image_url": "coco/1.png"}, {"type": "input_text", "text": "What is the colour?"}]},
                      {"role": "assistant", "content": [{"type": "output_text", "text": "Red."}]}]},
        "OpenAI messages", "Red.", None,
    ),
    "conversations as a text": ({"image": "coco/1.png", "conversations": json.dumps([*TURNS[:1], {"from": "bot", "value": "Red."}])},
        "LLaVA conversations", "Red.", None,
    ),
    "a verl prompt with its answer beside": (
        {"prompt": "<|vision_start|><|image_pad|><|vision_end|>What is the colour?", "image": "coco/1.png", "ground_truth": "red"},
        "verl prompt", "red", None,
    ),
    "MMMU's marker": ({"image": "coco/1.png", "question": "<image 1> What is the colour?"}, "problem and solution columns", None, None),
    "images empty": (
        {"images": [], "image": "coco/1.png", "problem": "What is the colour?", "solution": None},
        "problem and solution columns", None, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "json", "data.json"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_other_trainers_are_told_by_their_columns(name, kind, folder, tmp_path):
    record, layout, solution, thinking = LAYOUTS[name]
    path = folder / f"rows.{'json' if 'json' in kind and kind != 'jsonl' else kind}"
    documents = {"jsonl": record, "json": [record], "data.json": {"version": "1.0", "data": [record]}}
    path.write_text(json.dumps(documents[kind]) + "\n")
    for source in ("files", "jsonl", "parquet"):
        summary = prepare(source, tmp_path / source, input=str(path))
        assert (summary["layout"], summary["dropped"], summary["columns"]) == (layout, {}, None)
        assert one(tmp_path / source) == ("What is the colour?", solution, thinking, [PNG])


def test_verl_parquet_and_a_saved_dataset_of_it(tmp_path):
    record = LAYOUTS["verl"][0] | {"images": [{"bytes": PNG, "path": None}]}
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "train.parquet")
    datasets.Dataset.from_list([record]).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "train.parquet", tmp_path / "saved"):
        row = load.load_rows(str(path))[0]  # as data.path too
        assert (row["problem"], row["solution"], row["images"][0].size) == ("What is the colour?", "48", (40, 32))
        assert load.columns(str(path)) == ["id", "images", "problem", "solution", "source"]


def test_of_a_conversation_the_first_turn_is_taken_and_the_rest_is_counted(folder, tmp_path):
    lines = [
        {"image": "coco/1.png", "conversations": TURNS},
        {"images": ["coco/1.png", "coco/2.png"],
         "messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "<image>What is the colour?"},
                      {"role": "assistant", "content": "Red."}, {"role": "user", "content": "<image>And this?"}]},
        {"images": ["coco/1.png"], "query": "And now?", "response": "No.", "history": [["<image>What is the colour?", "Red."]]},
        {"image": "coco/1.png", "conversations": "[not JSON"},
        {"image": "coco/1.png", "conversations": []},
        {"image": "coco/1.png", "conversations": [TURNS[1], TURNS[0]]},
        {"image": "coco/1.png", "messages": [{"role": "tool", "content": "x"}]},
        {"image": "coco/1.png", "messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]},
        {"image": "coco/1.png", "messages": [3]},
        {"query": "What?", "image": "coco/1.png", "history": [3]},
    ]  # fmt: skip
    summary = prepare("files", tmp_path / "out", input=str(write_lines(folder / "x.jsonl", lines)))
    assert summary["dropped"] == {
        "later turn of a conversation": 3,
        "system message": 1,
        "conversation is not a list of messages": 2,
        "conversation without a question": 1,
        "conversation is not question and answer in turn": 2,
        "message part is neither text nor image": 1,
        "history is not a list of questions with answers": 1,
    }
    assert (summary["rows"], summary["read"]) == (3, 10)
    for row in rows_of(tmp_path / "out"):
        images = [image["bytes"] for image in row["images"]]
        assert (row["problem"], row["solution"], images) == ("What is the colour?", "Red.", [PNG])
    assert set(summary["layout"].split(", ")) == {
        "LLaVA conversations", "ms-swift messages", "ms-swift query and response"
    }  # fmt: skip


@pytest.mark.parametrize("kind, separator", [("csv", ","), ("csv", ";"), ("csv", "\t"), ("tsv", "\t")])
def test_csv_cells_are_text_and_need_no_metadata_name(kind, separator, folder, tmp_path, capsys, r1v):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator)
    cells = [["id", "picture", "q", "a"], ["007", "coco/0.png", 'What, "then"?\nNow', "NA"], ["8", B64, "Why?", ""]]
    writer.writerows([*cells, ["9", "coco/2.png", "How?", "nan"], ["10", "coco/2.png", "one", "cell", "more"]])
    (folder / f"mine.{kind}").write_text("\ufeff" + text.getvalue(), encoding="utf-8")
    argv = ["prepare-data", "files", "--input", str(folder), "--out", str(tmp_path / "out")]
    assert r1v(*argv) == 3
    said = capsys.readouterr()
    assert "--columns" in said.err and "id, picture, q, a" in said.err
    assert "accepted: conversations" in said.err
    assert r1v(*argv, "--columns", "question=q,image=picture,answer=a") == 0
    assert "named columns" in capsys.readouterr().out
    rows = rows_of(tmp_path / "out")
    assert [(r["id"], r["problem"], r["solution"]) for r in rows] == [
        ("007", 'What, "then"?\nNow', "NA"), ("8", "Why?", None), ("9", "How?", None)
    ]  # fmt: skip
    summary = json.loads((tmp_path / "out" / "data.json").read_text())
    assert summary["columns"] == {"problem": "q", "images": "picture", "solution": "a"}
    assert summary["dropped"] == {"line has more cells than the header": 1}


def test_a_sheet_that_cannot_be_read_is_told_with_what_mends_it(folder, tmp_path, capsys, r1v):
    """A mistyped column or folder, another encoding, a workbook, and a file in place of the source."""
    sheet = folder / "sheet.csv"

    def said(*more, code, input=sheet, source="files"):
        argv = ["prepare-data", source, "--input", str(input), "--out", str(tmp_path / "out"), *more]
        assert r1v(*argv) == code
        return capsys.readouterr().err

    sheet.write_text('Photo;Question\nnowhere/0.png;"What; or who?"\n')
    assert "did you mean Question?" in said("--columns", "problem=Qestion,image=Photo", code=2)
    err = said("--columns", "problem=Question,image=Photo", code=3)
    assert "hint: --images" in err and "accepted:" not in err
    assert f"prepare-data files --input {sheet}" in said(source=str(sheet), code=2)
    sheet.write_bytes("image,problem\ncoco/0.png,Où?\n".encode("cp1252"))
    assert "CSV UTF-8" in said(code=3)
    (folder / "sheet.xlsx").write_bytes(b"PK")
    assert "CSV UTF-8" in said(input=folder / "sheet.xlsx", code=2)


def test_an_image_that_belongs_to_another_turn_or_is_missing_is_never_the_first_ones(folder, tmp_path):
    later = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}, *TURNS[:2]]
    parts = [{"type": "image"}, {"type": "text", "text": "What is the colour?"}]
    lines = [
        {"images": ["coco/1.png", "coco/2.png"],
         "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Red."}, {"role": "user", "content": parts}]},
        {"image": "coco/1.png", "conversations": later},
        {"image": "coco/1.png", "problem": "<image>\n<image>\nWhich is larger?"},
        {"images": ["coco/1.png"], "query": "<image>Where is <ref-object>?", "response": "<bbox>", "objects": {"ref": ["it"]}},
        {"image": "coco/1.png", "conversations": [TURNS[0], {"from": "gpt", "value": {"bbox": [1, 2, 3, 4]}}]},
        {"image": "coco/1.png", "problem": "What?", "solution": "<ANSWER>3</ANSWER>"},
    ]  # fmt: skip
    summary = prepare("files", tmp_path / "out", input=str(write_lines(folder / "x.jsonl", lines)))
    assert one(tmp_path / "out") == ("What is the colour?", "Red.", None, [PNG])
    assert summary["dropped"] == {
        "later turn of a conversation": 1,
        "no image": 1,
        "fewer images than <image> markers": 1,
        "placeholders for objects and boxes": 1,
        "message part is neither text nor image": 1,
        "tags inside the reference answer": 1,
    }


def test_choices_beside_a_question_are_asked_with_it(folder, tmp_path):
    asked = "What is it?\nA. a cat\nB. a dog"
    kept = [
        ({"choices": ["a cat", "a dog"], "answer": "B"}, asked),
        ({"options": '["a cat", "a dog"]', "answer": "A dog"}, asked),
        ({"A": "a cat", "B": "a dog", "C": None, "answer": "(B)"}, asked),
        ({"choices": {"text": ["a cat", "a dog"], "label": ["A", "B"]}}, asked),
        ({"choices": ["(1) a cat", "(2) a dog"], "answer": "(2) a dog"}, "What is it?\nA. (1) a cat\nB. (2) a dog"),
        ({"choices": ["A) a cat", "B) a dog"], "answer": "b"}, "What is it?\nA) a cat\nB) a dog"),
        ({"options": "A. a cat B. a dog", "answer": "B"}, "What is it?\nA. a cat B. a dog"),
        ({"problem": "What is it, a cat or a dog?", "choices": ["a cat", "a dog"]}, "What is it, a cat or a dog?"),
        ({"choices": []}, "What is it?"),
    ]
    lost = [{"choices": ["a cat", "a dog"], "answer": 1}, {"choices": ["a cat", "a dog"], "answer": "C"}]
    lost += [{"choices": [{"bytes": "x"}, {"bytes": "y"}]}]
    lines = [{"image": "coco/1.png", "problem": "What is it?"} | change for change in [row for row, _ in kept] + lost]
    summary = prepare("files", tmp_path / "out", input=str(write_lines(folder / "x.jsonl", lines)))
    assert [row["problem"] for row in rows_of(tmp_path / "out")] == [text for _, text in kept]
    assert summary["dropped"] == {"solution is none of the choices": 2, "choices are not a list of texts": 1}


def test_columns_name_parts_of_a_conversation_too_and_infinite_cells_are_dropped(folder, tmp_path):
    source = write_lines(folder / "x.jsonl", [{"img": "coco/1.png", "conversations": TURNS[:2]}])
    prepare("files", tmp_path / "out", input=str(source), columns="image=img")
    assert one(tmp_path / "out") == ("What is the colour?", "Red.", None, [PNG])
    with pytest.raises(UsageError, match="two columns for problem"):
        prepare("files", tmp_path / "other", input=str(source), columns="problem=a,question=b")
    (folder / "x.csv").write_text("image,problem,solution\ncoco/1.png,A?,-inf\ncoco/1.png,B?,3\n")
    summary = prepare("files", tmp_path / "csv", input=str(folder / "x.csv"))
    assert (summary["rows"], summary["dropped"]) == (1, {"solution is not finite": 1})


def test_named_columns_may_lie_inside_others_and_must_be_there(folder, tmp_path):
    source = write_lines(folder / "x.jsonl", [{"img": "coco/1.png", "text": {"q": "What?"}, "id": 4.0}] * 1)
    prepare("files", tmp_path / "out", input=str(source), columns="problem=text.q, image=img")
    assert one(tmp_path / "out") == ("What?", None, None, [PNG]) and rows_of(tmp_path / "out")[0]["id"] == "4"
    for columns, word in (
        ("problem=text.q,image=imgs", "no column imgs; it has img, text, id"),
        ("problem=text.q,image=img,answer=gold", "no column gold"),
        ("quest=text", "want NAME=COLUMN"),
        ("problem", "want NAME=COLUMN"),
    ):
        with pytest.raises(UsageError, match=word):
            prepare("files", tmp_path / "other", input=str(source), columns=columns)


def test_a_document_that_is_no_list_of_records(folder, tmp_path):
    path = folder / "x.json"
    for text, word in (('{"a": [1], "b": [2]}', "several lists"), ("3", "want a list"), ('{"data": [', "not JSON")):
        path.write_text(text)
        with pytest.raises(DataError, match=word):
            prepare("files", tmp_path / "out", input=str(path))
    path.write_text('{"image": "coco/1.png", "problem": "A?"}\n{"image": "coco/1.png", "problem": "B?"}\n')  # lines
    assert prepare("files", tmp_path / "out", input=str(path))["rows"] == 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_other_encodings_are_refused_as_a_file(name, encoding, folder, tmp_path):
    (folder / name).write_text('{"problem": "What?"}\n' * 3, encoding=encoding)
    with pytest.raises(DataError, match=f"x.* is {encoding[:6]}.*not UTF-8") as caught:
        prepare("files", tmp_path / "out", input=str(folder / name))
    assert "iconv" in caught.value.hint


# --- splits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("test-00000-of-00001-2a9b1c4d.parquet", "test"),
        ("data/test-00000-of-00002.parquet", "test"),
        ("geo_test.jsonl", "test"),
        ("x-val.csv", "validation"),
        ("Test.json", "test"),
        ("val2017.json", "validation"),
        ("llava.dev.jsonl", "dev"),
        ("eval/questions.jsonl", "eval"),
        ("train/geo_test.jsonl", "test"),
        ("test/train.jsonl", "train"),
        ("train_val.jsonl", "validation"),
        ("clevr-training-set.json", "train"),
        ("testmini-00000-of-00001.parquet", "testmini"),
        ("train-00000.parquet", "train"),
        ("coreset-00001-of-00003.parquet", "coreset"),
        ("data-00001-of-00003.parquet", None),
        ("TestSet.json", "test"),
        ("refcoco_testA.json", "test"),
        ("testset.jsonl", "test"),
        ("tests/rows.jsonl", "test"),
        ("my_testing_set/rows.jsonl", "test"),
        ("held-out/rows.jsonl", "held-out"),
        ("development.csv", "dev"),
        ("测试集.jsonl", "test"),
        ("trainset.jsonl", "train"),
        ("attest/device.jsonl", None),
        ("latest.jsonl", None),
        ("contest/rows.jsonl", None),
        ("trainees.csv", None),
        ("questions.jsonl", None),
        ("VQATest2015.json", "test"),
        ("testquestions.json", "test"),
        ("val_annotations.json", "validation"),
        ("testimony.jsonl", None),
    ],
)
def test_a_split_is_a_word_of_the_name(name, split):
    assert split_of(name) == split


def test_test_files_never_become_training_rows(tmp_path, capsys):
    record = {"image": B64, "problem": "What?"}
    for name in ("test-00000-of-00001-0f3a.jsonl", "geo_test.jsonl", "x-val.jsonl"):
        path = write_lines(tmp_path / "one" / name, [record])
        with pytest.raises(UsageError, match="no split 'train'"):
            prepare("files", tmp_path / "out", input=str(path), split="train")
        assert "train" not in prepare("files", tmp_path / f"out-{name}", input=str(path))["splits"]
    write_lines(tmp_path / "one" / "train.jsonl", [record])
    summary = prepare("files", tmp_path / "all", input=str(tmp_path / "one"))
    assert {name: split["rows"] for name, split in summary["splits"].items()} == {
        "test": 2,
        "train": 1,
        "validation": 1,
    }
    write_lines(tmp_path / "one" / "more.jsonl", [record])
    with pytest.raises(UsageError, match=r"the split of more\.jsonl is not known") as caught:
        prepare("files", tmp_path / "out", input=str(tmp_path / "one"))
    assert "--split" in caught.value.hint
    assert prepare("files", tmp_path / "out", input=str(tmp_path / "one"), split="val")["splits"].keys() == {
        "validation"
    }
    assert "left out, their split is not known: more.jsonl" in capsys.readouterr().err
    write_hub_parquet(tmp_path / "bare" / "geo_test.parquet", [R1V])
    with pytest.raises(UsageError, match="it has test"):
        load.ensure_rows(str(tmp_path / "bare"))
    datasets.Dataset.from_list([{"problem": "What?", "image": {"bytes": PNG}}], split="test").save_to_disk(
        tmp_path / "s"
    )
    assert prepare("files", tmp_path / "saved", input=str(tmp_path / "s"))["splits"].keys() == {"test"}
    both = datasets.Dataset.from_list([{"problem": "What?", "image": {"bytes": PNG}}])
    datasets.DatasetDict(train=both).save_to_disk(tmp_path / "d" / "x")
    assert len(load.load_rows(str(tmp_path / "d" / "x"))) == 1
    shutil.rmtree(tmp_path / "d" / "x")
    datasets.DatasetDict(test=both).save_to_disk(tmp_path / "d" / "x")  # the same bytes: what was cached is not theirs
    with pytest.raises(UsageError, match="it has test"):
        load.load_rows(str(tmp_path / "d" / "x"))


def test_a_folder_key_or_column_that_says_test_keeps_rows_out_of_training(tmp_path):
    record = {"image": B64, "problem": "What?"}
    path = write_lines(tmp_path / "my_testing_set" / "rows.jsonl", [record])
    with pytest.raises(UsageError, match="no split 'train'"):
        prepare("files", tmp_path / "out", input=str(path), split="train")
    path = write_lines(tmp_path / "a_test_project" / "rows.jsonl", [record])
    assert prepare("files", tmp_path / "project", input=str(path))["splits"].keys() == {"train"}
    (tmp_path / "rows.json").write_text(json.dumps({"test": [record]}))
    with pytest.raises(DataError, match="holds records of test"):
        prepare("files", tmp_path / "out", input=str(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text(json.dumps({"split": "test", "data": [record]}))
    with pytest.raises(DataError, match="holds records of test"):
        prepare("files", tmp_path / "out", input=str(tmp_path / "rows.json"))
    said = [{"split": "val"}, {"extra_info": {"split": "test"}}, {"split": "train"}, {"split": None}, {"split": "x"}]
    said += [
        {"partition": "test"},
        {"data_subtype": "val2014"},
        {"data_subtype": "train2014"},
        {"subset": "test tubes"},
    ]
    path = write_lines(tmp_path / "rows.jsonl", [record | more for more in said])
    summary = prepare("files", tmp_path / "column", input=str(path))
    assert (summary["rows"], summary["dropped"]) == (5, {"record of another split": 4})


def test_a_saved_dataset_in_a_folder_of_a_split_and_files_of_another_kind(tmp_path, capsys):
    record = {"problem": "What?", "image": {"bytes": PNG}}
    datasets.Dataset.from_list([record]).save_to_disk(tmp_path / "test" / "rows")
    assert prepare("files", tmp_path / "a", input=str(tmp_path / "test" / "rows"))["splits"].keys() == {"test"}
    write_lines(tmp_path / "x" / "test.jsonl", [{"problem": "What?", "image": B64}])
    (tmp_path / "x" / "train.json").write_text(json.dumps([{"problem": "What?", "image": B64}]))
    assert prepare("files", tmp_path / "b", input=str(tmp_path / "x"))["splits"].keys() == {"test"}
    assert "only .jsonl files are read; left out: train.json" in " ".join(capsys.readouterr().err.split())


# --- images ----------------------------------------------------------------------------------------------------


def test_images_in_several_folders_and_what_lies_outside_of_them(folder, tmp_path, capsys, r1v):
    vg, outside = tmp_path / "vg", tmp_path / "secret.png"
    vg.mkdir()
    (vg / "v.png").write_bytes(picture(7))
    outside.write_bytes(picture(8))
    (folder / "to-vg.png").symlink_to(vg / "v.png")
    names = ["coco/1.png", "v.png", str(vg / "v.png"), "to-vg.png", str(outside), "../secret.png"]
    source = write_lines(tmp_path / "x.jsonl", [{"image": n, "problem": "What?"} for n in names])
    argv = ["prepare-data", "files", "--input", str(source), "--out", str(tmp_path / "out"), "--json"]
    assert r1v(*argv, "--images", str(folder), "--images", str(vg)) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["rows"] == 4 and summary["dropped"] == {"image path leaves the root": 2}
    assert summary["dropped_places"]["image path leaves the root"][0] == (
        f"x.jsonl:5 ({outside} is outside of {folder}, {vg})"
    )


# --- parquet as data.path --------------------------------------------------------------------------------------


def test_parquet_files_as_data_path_are_read_as_prepare_data_would_write_them(tmp_path, capsys):
    deep = io.BytesIO()
    from PIL import Image

    Image.new("I;16", (40, 32), 30000).save(deep, "PNG")
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 32), "red").save(turned, "JPEG", exif=exif)
    rows = [
        {"id": 1.0, "images": [{"bytes": deep.getvalue(), "path": None}], "problem": "<image>What?", "solution": "<answer> 3 </answer>"},
        {"id": 2.0, "images": [{"bytes": turned.getvalue(), "path": None}], "problem": "Why?", "solution": "<answer><answer>4</answer>"},
        {"id": 3.0, "images": [{"bytes": b"broken", "path": None}], "problem": "How?", "solution": None},
        {"id": 4.0, "images": [], "problem": "How?", "solution": None},
    ]  # fmt: skip
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    found = load.load_rows(str(file))
    assert found["problem"] == ["What?", "Why?"] and found["solution"] == ["3", "4"] and found["id"] == ["1", "2"]
    assert found[0]["images"][0].getpixel((3, 3)) == (116,) * 3 and found[1]["images"][0].size == (32, 40)
    assert "dropped 1 records: not an image" in capsys.readouterr().err
    prepare("files", tmp_path / "out", input=str(file))
    assert load.data_sha256(str(file)) == load.data_sha256(str(tmp_path / "out"))
    folder = load.ensure_rows(str(file))
    assert folder.is_relative_to(tmp_path / "cache") and load.find_rows(str(file)) == folder
    copy = tmp_path / "elsewhere" / "rows.parquet"
    copy.parent.mkdir()
    copy.write_bytes(file.read_bytes())
    assert load.ensure_rows(str(copy)) == folder  # by content
    held = tmp_path / "my_testing_set" / "rows.parquet"
    held.parent.mkdir()
    held.write_bytes(file.read_bytes())
    with pytest.raises(UsageError, match="no split 'train'"):  # though the same bytes are in the cache as train
        load.ensure_rows(str(held))
    pq.write_table(pa.Table.from_pylist(rows[:1]), file)
    assert load.ensure_rows(str(file)) != folder and len(load.load_rows(str(file))) == 1


def test_files_that_name_their_images_are_no_data_path(folder):
    path = write_lines(folder / "rows.jsonl", [{"image": "coco/1.png", "problem": "What?"}])
    for place in (path, folder):
        with pytest.raises(DataError, match="holds no rows") as caught:
            load.ensure_rows(str(place))
        assert f"r1v prepare-data files --input {place} --out" in caught.value.hint
