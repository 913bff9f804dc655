"""The rule judge's reading of yes and no, the labels of a chat judge, and the judge prompt."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1vfree_cli.core.errors import UsageError
from r1vfree_cli.eval import endpoint as client
from r1vfree_cli.eval import judgements, reading, result
from r1vfree_cli.eval.hallusion import judge
from r1vfree_cli.eval.hallusion.benchmark import BENCHMARK
from r1vfree_cli.eval.hallusion.questions import Question
from r1vfree_cli.eval.hallusion.score import RIGHT, UNCLEAR, WRONG, Item

YES = [
    "Yes",
    "yes.",
    "Yes, there is no bar",
    "**Yes**",
    "'Yes'",
    "Correct.",
    "This is correct.",
    "True",
    "No doubt, yes.",
    "Answer: Yes",
    "The final answer is \\boxed{Yes}",
    "I would say yes.",
    "Yes it's wrong",
    "Based on the chart, yes",
    "<think>no, no. The answer is no</think><answer>Yes</answer>",
    "<think>a</think>\n<answer>\nYes\n</answer>",
    "<answer>Yes",
    "Yes.\n\nThe circle is larger. There is no other.",
    "<answer>No</answer> wait <answer>Yes</answer>",
]
NO = [
    "no",
    "NO",
    "Nope.",
    "<b>No</b>",
    "**No**, it only looks like it",
    "That is not correct.",
    "not correct",
    "It isn't true",
    "Incorrect",
    "The claim is false.",
    "That's wrong",
    "The statement is not entirely accurate.",
    "The answer is no.",
    'The answer is "No".',
    '{"answer": "no"}',
    "No, the answer is no",
    "There is no bar in the image.",
    "No one is there.",
    "In the image, there are no people, so no.",
    "<answer>\nNo.\n</answer>",
]
UNREADABLE = [
    "",
    "   ",
    "Yes and no",
    "Yes. No.",
    "Yes, wait, no.",
    "Yes... The answer is no.",
    "Yes or no? I cannot say.",
    "No idea",
    "I cannot tell.",
    "Not sure",
    "It is unclear",
    "The lines are parallel",
    "The red one is on the right.",
    "It is right of the box",
    "It's right there on the left",
    "Noted. Northern. Yesterday.",
    "Based on the image, No. 3 is larger",
    "not correct, it is correct",
    "<think>is it? yes",
    "The answer is yes.</think>",
    "<think>The answer is yes.</think>",
    "1",
]


@pytest.mark.parametrize("text", YES)
def test_yes(text):
    assert reading.read_yes_no(text) == "yes"


@pytest.mark.parametrize("text", NO)
def test_no(text):
    assert reading.read_yes_no(text) == "no"


@pytest.mark.parametrize("text", UNREADABLE)
def test_neither(text):
    assert reading.read_yes_no(text) is None


def test_thinking_that_the_chat_template_opened_is_not_read():
    assert reading.read_yes_no("The bar is there. So, no?\nNo.</think>\n\nYes.") == "yes"
    assert reading.read_yes_no("Yes. <think>because of no bar</think>") == "yes"


@given(st.text("yesno ,.<>/think\n*", max_size=60) | st.text(max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_text_is_read_without_a_crash(text):
    assert reading.read_yes_no(text) in ("yes", "no", None)


@given(st.text(max_size=40), st.sampled_from(["yes", "no"]))
@settings(max_examples=40, deadline=None)
def test_reasoning_is_never_read(thought, answer):
    thought = thought.replace("<", "").replace(">", "")
    assert reading.read_yes_no(f"<think>{thought}</think><answer>{answer}</answer>") == answer


def test_long_replies_are_read_in_linear_time():
    for text in ("yes " * 50_000, "<think>" * 20_000, "not " * 50_000, "<a" * 50_000, " " * 200_000 + "x"):
        reading.read_yes_no(text)


def test_rule_codes():
    assert [reading.rule_code("Yes", gt) for gt in (1, 0)] == [RIGHT, WRONG]
    assert [reading.rule_code("No", gt) for gt in (1, 0)] == [WRONG, RIGHT]
    assert [reading.rule_code("hm", gt) for gt in (1, 0)] == [UNCLEAR, UNCLEAR]


def test_judge_input():
    reply = "<think>so</think><answer>Yes</answer>"
    assert reading.judged_text(reply, "answer") == "Yes"
    assert reading.judged_text(reply, "reply") == reply
    assert reading.judged_text("plain", "answer") == "plain"


def test_agreement_counts_judged_questions_only():
    rule = {key: reading.rule_code(text, 1) for key, text in {"a": "Yes", "b": "No", "c": "hm", "d": "Yes"}.items()}
    found = result.agreement(rule, {"a": 1, "b": 1, "c": 0, "d": None})
    assert found == {"n": 3, "agree": 1, "readable": 2, "agree_readable": 1}


def question(figure: int, number: int = 0, category: str = "VD", gt: int = 1) -> Question:
    visual = figure if category == "VS" else figure + 1
    return Question(Item(category, "ocr", "0", str(figure), str(number), min(visual, 2), gt), "Is it?", "It is.", None)


def test_rule_judge_answers_same_by_equal_readings(tmp_path):
    questions = [question(0), question(1), question(2)]
    replies = {"VD_ocr_0_0_0": "Yes", "VD_ocr_0_1_0": "yes, it is", "VD_ocr_0_2_0": "No"}
    outcome = judgements.by_rule(BENCHMARK, questions, replies, tmp_path / "judgements.jsonl")
    judged = outcome.judged(BENCHMARK, questions)
    assert [i.same for i in judged] == [1, 1, 0]
    assert [i.code for i in judged] == [1, 1, 0]
    assert judgements.read(tmp_path / "judgements.jsonl") == outcome.judgements


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("correct", 1),
        ("Correct.", 1),
        ("**incorrect**", 0),
        ("Label: unclear", 2),
        ('{"label": "incorrect"}', 0),
        ("The prediction is correct", 1),
        ("<think>correct or incorrect?</think>\nincorrect", 0),
        ("is it not correct?</think>\nincorrect", 0),
        ("<think>the answer is correct as far as", None),
        ("It could be correct or incorrect.\nLabel: correct", 1),
        ("correct or incorrect", None),
        ("not correct", None),
        ("It isn't correct", None),
        ("I don't know", None),
        ("", None),
        ("uncorrectable", None),
    ],
)
def test_labels_are_parsed_strictly(text, label):
    assert judge.parse_label(text, judge.VERDICTS) == label


def test_same_labels():
    assert judge.parse_label("same", judge.SAMES) == 1
    assert judge.parse_label("Different.", judge.SAMES) == 0
    assert judge.parse_label("not the same", judge.SAMES) is None


CHOICE = {"message": {"content": "correct"}, "finish_reason": "stop"}


@pytest.mark.parametrize(
    "document",
    [
        [1],
        None,
        "correct",
        {},
        {"choices": None},
        {"choices": []},
        {"choices": [None]},
        {"choices": {"a": 1}},
        {"choices": [{}]},
        {"choices": [{"message": None}]},
        {"choices": [{"message": {"content": ["correct"]}}]},
        {"choices": [{"message": {"content": 1}}]},
        b"<html>bad gateway</html>",
        b'{"choices": [{"mess',
        b"\xff\xfe",
        b"",
    ],
)
def test_a_body_that_is_no_chat_completion_is_a_failed_call(document):
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    with pytest.raises(client.CallFailed) as e:
        client.read_reply(body, "m")
    assert e.value.kind == "bad reply"


def test_a_chat_completion_may_lack_what_is_only_counted():
    def read(**more):
        return client.read_reply(json.dumps({"choices": [CHOICE], **more}).encode(), "m")

    whole = {"model": "m-1", "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    assert read(**whole) == client.Reply("correct", "m-1", "stop", 3, 1)
    for usage in (None, {}, [], {"prompt_tokens": None}, {"prompt_tokens": "3"}):
        assert read(usage=usage, model=None) == client.Reply("correct", "m", "stop", 0, 0)
    for message in ({}, {"content": None}):
        body = json.dumps({"choices": [{"message": message, "finish_reason": "length"}]}).encode()
        assert client.read_reply(body, "m") == client.Reply("", "m", "length", 0, 0)
    half = client.read_reply(b'{"choices": [{"message": {"content": "yes \\ud83d"}}]}', "m")
    assert half.text == "yes ?" and half.finish is None


def test_braces_in_a_question_mean_nothing():
    text = judge.fill("{question}|{reference}|{prediction}|{x}", question="{prediction}", reference="{", prediction="p")
    assert text == "{prediction}|{|p|{x}"


def test_a_judge_prompt_must_show_all_three_texts(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("{question} {prediction}")
    with pytest.raises(UsageError, match="reference"):
        judge.load_prompt(file)
    with pytest.raises(UsageError, match="cannot read"):
        judge.load_prompt(tmp_path / "none.txt")
    file.write_text("{question} {prediction} {reference}")
    assert judge.load_prompt(file) == file.read_text()


def test_a_half_written_last_line_is_cut(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"id": 1}\n{"id": ')
    judgements.repair_tail(file)
    assert file.read_bytes() == b'{"id": 1}\n'
    file.write_bytes(b'{"id"')
    judgements.repair_tail(file)
    assert file.read_bytes() == b""


def test_a_judge_cache_keyed_by_position_is_a_trap_avoided():
    """The key is what the judge is shown: other text, other wording, other model, other key; never the position."""
    from r1vfree_cli.eval.endpoint import Endpoint

    one = judge.ChatJudge(Endpoint("http://a/v1", "m"))
    q = question(0)
    keys = {
        one.question(q, "Yes")[0],
        one.question(q, "No")[0],
        judge.ChatJudge(Endpoint("http://a/v1", "n")).question(q, "Yes")[0],
        judge.ChatJudge(Endpoint("http://a/v1", "m"), "{question}{reference}{prediction}").question(q, "Yes")[0],
    }
    assert len(keys) == 4
    assert one.question(question(1, 3), "Yes")[0] == one.question(q, "Yes")[0]
