"""The rule judge's reading of yes and no, the labels of a chat judge, and the judge prompt."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1vfree_cli.core import files
from r1vfree_cli.core.errors import UsageError
from r1vfree_cli.eval import judgements, reading, result
from r1vfree_cli.eval.hallusion import judge
from r1vfree_cli.eval.hallusion.benchmark import BENCHMARK
from r1vfree_cli.eval.hallusion.questions import Question
from r1vfree_cli.eval.hallusion.score import RIGHT, UNCLEAR, WRONG, Item
from r1vfree_cli.judges.chat import stated_label, verdict_text
from r1vfree_cli.judges.client import Endpoint
from r1vfree_cli.judges.protocol import Failure
from r1vfree_cli.judges.replies import Reply, read_reply, strict_json

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
    heads = ("yes ", "<think>", "not ", "<a", "<answer>", "<caption>", "</caption>", "<caption>no</caption>", "是", "是，x", "“", "\n", "it is no, ",
             "some say yes ", "the answer is ", "\\boxed{", "{", "[think]", "a. yes b. no ", "n't ", "no doubt ", "final answer: ")  # fmt: skip
    for text in (*(head * (60_000 // len(head)) for head in heads), " " * 200_000 + "x"):
        start = time.perf_counter()
        reading.read_yes_no(text)
        reading.read_vlmevalkit(text)
        assert time.perf_counter() - start < 8, text[:20]


def test_rule_codes():
    assert [BENCHMARK.code(question(0, gt=gt), "Yes") for gt in (1, 0)] == [RIGHT, WRONG]
    assert [BENCHMARK.code(question(0, gt=gt), "No") for gt in (1, 0)] == [WRONG, RIGHT]
    assert [BENCHMARK.code(question(0, gt=gt), "hm") for gt in (1, 0)] == [UNCLEAR, UNCLEAR]


def test_judge_input():
    reply = "<think>so</think><answer>Yes</answer>"
    assert reading.judged_text(reply, "answer") == "Yes"
    assert reading.judged_text(reply, "reply") == reply
    assert reading.judged_text("plain", "answer") == "plain"
    assert reading.judged_text("<think>so</think>No.", "answer").strip() == "No."
    for silent in ("<think>yes</think>", "<think>yes", "<answer> </answer>", " \n", "<|im_end|>"):
        assert reading.judged_text(silent, "answer") is None and reading.judged_text(silent, "reply") is None
    assert reading.judged_text("<think>yes</think>", "reply", "vlmevalkit") == "<think>yes</think>"


def test_agreement_counts_judged_questions_only():
    replies = {"a": "Yes", "b": "No", "c": "hm", "d": "Yes"}
    rule = {key: BENCHMARK.code(question(0), text) for key, text in replies.items()}
    found = result.agreement(rule, {"a": 1, "b": 1, "c": 0, "d": None})
    assert found == {"n": 3, "agree": 1, "readable": 2, "agree_readable": 1}


def question(figure: int, number: int = 0, category: str = "VD", gt: int = 1) -> Question:
    visual = figure if category == "VS" else figure + 1
    return Question(Item(category, "ocr", "0", str(figure), str(number), min(visual, 2), gt), "Is it?", "It is.", None)


def test_rule_judge_answers_same_by_equal_readings(tmp_path):
    questions = [question(0), question(1), question(2)]
    replies = {"VD_ocr_0_0_0": "Yes", "VD_ocr_0_1_0": "yes, it is", "VD_ocr_0_2_0": "No"}
    found = judgements.by_rule(BENCHMARK, questions, replies, tmp_path / "judgements.jsonl")
    judged = judgements.judged(BENCHMARK, questions, found)
    assert [i.same for i in judged] == [1, 1, 0]
    assert [i.code for i in judged] == [1, 1, 0]
    assert judgements.read(tmp_path / "judgements.jsonl") == found


def test_what_was_never_answered_blocks_no_score_of_its_pair():
    """Nothing can be compared with a reply that is not there: `same` stays unknown, and is not waited for."""
    questions = [question(0, category="VS"), question(1, category="VS")]
    first, second = (q.id for q in questions)
    found = {first: judgements.no_reply(BENCHMARK, questions[0]), second: judgements.Judgement(id=second, key="k")}
    assert judgements.unjudged(BENCHMARK, questions, found) == [second]
    found[second].code = WRONG
    assert judgements.unjudged(BENCHMARK, questions, found) == []
    found[first] = judgements.Judgement(id=first, key="k", code=WRONG)
    assert judgements.unjudged(BENCHMARK, questions, found) == [second], "answered, so that `same` can be asked"
    del found[first]
    assert judgements.unjudged(BENCHMARK, questions, found) == [first]


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
        ("partially correct", None),
        ("Partially correct.", None),
        ("It cannot be judged correct.", None),
        ("hardly correct", None),
        ("far from correct", None),
        ("The answer is far from correct", None),
        ("The answer is partially correct", None),
        ("Correct, but only in part", None),
        ("Correct... or is it?", None),
        ("Incorrect: the prediction says yes but the correct answer is no.", 0),
        ("Incorrect, wait, it matches.", None),
        ("\\boxed{\\text{incorrect}}", 0),
        ("<|begin_of_box|>correct<|end_of_box|>", 1),
        ("Correct. Wait, it is incorrect.", None),
        ("incorrect - the correct answer is no", 0),
        ("Incorrect. The correct answer is 'no', so this does not match.", 0),
        ("**Incorrect**\n\nThe student says yes; the correct answer is no.", 0),
        ("Correct: it does not conflict with the reference.", 1),
        ("Correct. It is not really in the chart.", None),
        ("The student's answer is unclear.", 2),
        ("The reference answer is correct", None),
        ("The verdict is: **correct**.", 1),
        ('```json\n{"label": "correct", "why": "it is"}\n```', 1),
        ('{"label": "partially correct"}', None),
        ('{"label": "incorrect", "label": "correct"}', None),
        ('{"label": 1}', None),
        ("Label: correct\nLabel: incorrect", None),
        ("<thinking>Label: correct</thinking>Label: incorrect", 0),
        *(
            (f"<{tag}>Label: correct</{tag}>\nLabel: incorrect", 0)
            for tag in ("think", "reasoning", "reflection", "thought", "analysis")
        ),
        ("◁think▷correct◁/think▷incorrect", 0),
        *(
            (text, None)
            for text in (
                "mostly correct",
                "barely correct",
                "nowhere near correct",
                "anything but correct",
                "by no means correct",
                "correct-ish",
                "semi-correct",
                "half correct",
                "technically correct",
                "less than correct",
                "Correct?",
                "Label: correct?",
                "correct in part",
                "Correct (partially)",
                "correct to some extent",
                "This is correct only for the left bar",
                "Correct, though incomplete.",
                "It can't be judged as correct.",
                "not incorrect",
                "The answer isn't incorrect",
                "neither correct nor incorrect",
                "It would be correct if the reference said no.",
                "Correct if the reference is wrong",
                "The correct answer is no",
                "Correct answer: yes",
                "The reference is correct.",
                "I doubt the answer is correct",
                "No way the answer is correct",
                "It is unlikely that the answer is correct",
                "Nobody says the answer is correct",
                "The answer is correct; however it misses one",
                "It is unclear whether the answer is correct.",
                "unclear, maybe correct",
                "correct\nincorrect",
                "correct (not)",
                "correct: false",
                "Correct? No.",
                '{"verdict": "correct"}',
            )
        ),
        *(
            (text, 1)
            for text in (
                "This is correct.",
                "It is correct",
                "**Label:** correct",
                "Label - correct",
                "<label>correct</label>",
                "\\boxed{correct}",
                "1. correct",
                "Thus, the answer is correct.",
                "The answer is correct because it matches.",
                "Correct — it matches the reference.",
                "The student says no.\nThe correct answer is no.\nLabel: correct",
            )
        ),
        *(
            (text, 0)
            for text in (
                "This is incorrect.",
                "The answer is incorrect; the correct answer is no",
                "incorrect (the correct answer: no)",
                "The student's answer is incorrect because the correct answer is no.",
                "Therefore: incorrect",
                "Incorrect. It should be yes.",
                '{"reason": "the correct answer is no", "label": "incorrect"}',
                "Let me compare.\nThe reference is correct.\nLabel: incorrect",
            )
        ),
        ("correct, mostly", None),
        ("Correct (unsure)", None),
        ("Correct - for the most part", None),
        ("Label: correct (with errors)", None),
        ("correct, sort of", None),
        ("correct. It has no errors", 1),
        ("incorrect, mostly", 0),
        ("correct\nNo wait, that is wrong", None),
        ("correct\nHmm, on second thought it conflicts", None),
        ("correct\nActually, the student said two", None),
        ("correct\n\nNo conflict with the reference.", 1),
        ("incorrect\nThe reference says no.\nNo match.", 0),
    ],
)
def test_labels_are_parsed_strictly(text, label):
    reply = Reply(text, "m", "stop", 1, 1, None if text else "empty")
    try:
        found = stated_label(verdict_text(reply), judge.VERDICTS)
    except Failure:
        found = None
    assert found == label


def test_same_labels():
    assert stated_label("same", judge.SAMES) == 1
    assert stated_label("Different.", judge.SAMES) == 0
    assert stated_label("not the same", judge.SAMES) is None


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
    with pytest.raises(Failure) as e:
        read_reply(strict_json(body), "m")
    assert e.value.kind == "unparsable"


def test_a_chat_completion_may_lack_what_is_only_counted():
    def read(choice=CHOICE, **more):
        return read_reply({"choices": [choice], **more}, "m")

    whole = {"model": "m-1", "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    assert read(**whole) == Reply("correct", "m-1", "stop", 3, 1)
    for usage in (None, {}, [], {"prompt_tokens": None}, {"prompt_tokens": "3"}, {"prompt_tokens": -1}):
        assert read(usage=usage, model=None) == Reply("correct", "m", "stop", 0, 0)
    half = read_reply(strict_json(b'{"choices": [{"message": {"content": "yes \\ud83d"}}]}'), "m")
    assert half.text == "yes ?" and half.finish is None
    parts = [{"type": "reasoning", "text": "no"}, {"type": "text", "text": "ye"}, {"type": "text", "text": "s"}]
    assert read({"message": {"content": parts}}).text == "yes"


@pytest.mark.parametrize(
    ("message", "finish", "cause"),
    [
        ({}, "length", "length"),
        ({}, "MAX_TOKENS", "length"),
        ({"content": "yes"}, "end_turn", None),
        ({"content": None}, "stop", "empty"),
        ({"content": " "}, None, "empty"),
        ({"content": None, "reasoning_content": "so ..."}, "stop", "reasoning"),
        ({"content": None, "tool_calls": [{}]}, "tool_calls", "tool_calls"),
        ({"content": "yes"}, "length", None),
    ],
)
def test_an_empty_reply_says_why(message, finish, cause):
    assert read_reply({"choices": [{"message": message, "finish_reason": finish}]}, "m").cause == cause


@pytest.mark.parametrize(
    ("choice", "kind"),
    [
        ({"message": {"content": None}, "finish_reason": "content_filter"}, "content_filter"),
        ({"message": {"content": "", "refusal": "I can not"}, "finish_reason": "stop"}, "refusal"),
        ({"message": {"content": [{"type": "refusal", "refusal": "no"}]}, "finish_reason": "stop"}, "refusal"),
        ({"message": {"content": ""}, "finish_reason": "error"}, "server_error"),
        ({"message": {"content": ""}, "finish_reason": None, "error": {"code": 502}}, "server_error"),
        ({"message": {"content": "Yes"}, "finish_reason": "Cancelled"}, "unfinished"),
        # As others name it: a half reply would be scored as the model's own.
        ({"message": {"content": "Yes"}, "finish_reason": "SAFETY"}, "content_filter"),
        ({"message": {"content": "Yes"}, "finish_reason": "insufficient_system_resource"}, "unfinished"),
        ({"message": {"content": ""}, "finish_reason": "cancelled"}, "unfinished"),
    ],
)
def test_a_refused_or_broken_reply_is_no_empty_answer(choice, kind):
    with pytest.raises(Failure) as e:
        read_reply({"choices": [choice]}, "m")
    assert e.value.kind == kind


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
    files.repair_tail(file)
    assert file.read_bytes() == b'{"id": 1}\n'
    file.write_bytes(b'{"id"')
    files.repair_tail(file)
    assert file.read_bytes() == b""


def test_a_judge_cache_keyed_by_position_is_a_trap_avoided():
    """The key is what the judge is shown: other text, other wording, other model, other key; never the position."""
    one = judge.LabelJudge(Endpoint("http://a/v1", "m"))
    q = question(0)
    keys = {
        one.question(q, "Yes")[0],
        one.question(q, "No")[0],
        judge.LabelJudge(Endpoint("http://a/v1", "n")).question(q, "Yes")[0],
        judge.LabelJudge(Endpoint("http://a/v1", "m"), "{question}{reference}{prediction}").question(q, "Yes")[0],
    }
    assert len(keys) == 4
    assert one.question(question(1, 3), "Yes")[0] == one.question(q, "Yes")[0]
