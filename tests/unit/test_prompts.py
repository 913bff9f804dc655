"""The one prompt and the one parser."""

import pytest

from r1vfree_cli.core import prompts


def test_image_comes_before_the_question_and_the_question_before_the_instruction():
    (message,) = prompts.build_messages("How many {cubes}?", num_images=2)
    assert [part["type"] for part in message["content"]] == ["image", "image", "text"]
    text = message["content"][-1]["text"]
    assert text.index("How many {cubes}?") < text.index("<answer>")


def test_text_only_rows_get_no_placeholder():
    (message,) = prompts.build_messages("Why?", num_images=0)
    assert [part["type"] for part in message["content"]] == ["text"]


def test_a_target_reads_back_as_exactly_formed():
    parsed = prompts.parse(prompts.target_text("one,\ntwo", "three\nfour"))
    assert (parsed.thinking, parsed.answer, parsed.problem) == ("one,\ntwo", "three\nfour", None)


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_trap_none_is_never_a_training_target(answer):
    with pytest.raises(ValueError):
        prompts.target_text("thinking", answer)


@pytest.mark.parametrize(
    "text, answer, problem, tag",
    [
        ("<think>a</think><answer>b</answer>", "b", None, None),
        ("\n<think>a\nb</think>\n\n<answer>c\nd</answer>\n", "c\nd", None, None),
        ("<think></think><answer>b</answer>", "b", None, None),
        ("b", None, "missing", "answer"),
        ("", None, "missing", "answer"),
        ("<think>a</think>", None, "missing", "answer"),
        ("<think>a</think><answer>b", None, "unclosed", "answer"),
        ("<think>a</think><answer> \n</answer>", None, "empty", "answer"),
        ("<answer>b</answer>", "b", "missing", "think"),
        ("<think>a<answer>b</answer>", "b", "unclosed", "think"),
        ("<think>a</think><answer>b</answer>c", "b", "extra text", None),
        ("x<think>a</think><answer>b</answer>", "b", "extra text", None),
        ("<think>a</think> so <answer>b</answer>", "b", "extra text", None),
        ("<think>a</think><answer>b</answer><answer>c</answer>", "c", "extra text", None),
        ("<think>a <answer>b</answer></think><answer>c</answer>", "c", "extra text", None),
        ("<think>a</think><think>a</think><answer>c</answer>", "c", "extra text", None),
        ("<answer>c</answer><think>a</think>", "c", "extra text", None),
        ("<think>a</think><ANSWER>c</ANSWER>", None, "missing", "answer"),
    ],
)
def test_trap_newlines_and_last_answer(text, answer, problem, tag):
    parsed = prompts.parse(text)
    assert (parsed.answer, parsed.problem, parsed.tag) == (answer, problem, tag)


def test_a_closing_tag_before_the_opening_one_closes_nothing():
    assert prompts.parse("</answer><think>a</think><answer>b").problem == "unclosed"


def test_a_very_long_reply_is_read_in_linear_time():
    assert prompts.parse("<think>" * 100_000 + "</think><answer>" * 50_000).problem == "unclosed"


def test_the_template_hash_follows_the_instruction(monkeypatch):
    before = prompts.template_hash()
    monkeypatch.setattr(prompts, "INSTRUCTION", prompts.INSTRUCTION + " Be brief.")
    assert prompts.template_hash() != before


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|vision_start|>"])
def test_control_tokens_in_data_stay_text(token):
    (message,) = prompts.build_messages(f"What does {token} mean?")
    assert token not in message["content"][-1]["text"] and token[1:] in message["content"][-1]["text"]
    assert token not in prompts.target_text(token, f"a {token} b")
    assert prompts.user_text("Is a < b, or |x| > 1?").startswith("Is a < b, or |x| > 1?")
