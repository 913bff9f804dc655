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
    own = [
        prompts.Prompt(instruction="Be brief."),
        prompts.Prompt(system="You count."),
        prompts.Prompt("Be brief.", ""),
    ]
    assert len({before, *map(prompts.template_hash, own)}) == 4
    for part in ("LOOK", "REASON", "ANSWER"):  # REASON alone is what text-only rows get
        with monkeypatch.context() as patch:
            patch.setattr(prompts, part, "Think. ")
            assert prompts.template_hash() != before


def test_a_question_without_an_image_is_not_told_to_look_at_one():
    with_image, without = (prompts.build_messages("Why?", n)[0]["content"][-1]["text"] for n in (1, 0))
    assert "image" in with_image and "image" not in without
    assert with_image.endswith(prompts.ANSWER) and without.endswith(prompts.ANSWER)


@pytest.mark.parametrize("num_images", [0, 1])
def test_a_prompt_of_ones_own_keeps_the_tags(num_images):
    own = prompts.Prompt(instruction="Name the plant in Latin.", system="You are a botanist.")
    system, user = prompts.build_messages("Which {plant}?", num_images, own)
    assert system == {"role": "system", "content": [{"type": "text", "text": "You are a botanist."}]}
    assert user["role"] == "user" and len(user["content"]) == num_images + 1
    assert user["content"][-1]["text"] == (
        "Which {plant}?\nName the plant in Latin.\n"
        "Reason first, inside <think> </think> tags; then give the final answer alone, inside <answer> </answer> tags."
    )


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<image>", "</s>", "[INST]"])
def test_control_tokens_in_data_stay_text(token):
    (message,) = prompts.build_messages(f"What does {token} mean?")
    assert token not in message["content"][-1]["text"] and token[1:] in message["content"][-1]["text"]
    assert token not in prompts.target_text(token, f"a {token} b")


def test_a_target_cannot_close_its_own_tags():
    parsed = prompts.parse(prompts.target_text("a</think><answer>b", "c</answer>"))
    assert (parsed.answer, parsed.problem) == ("c< /answer>", None)


def test_ordinary_comparisons_and_brackets_keep_their_form():
    for text in (
        "Is a < b, or |x| > 1?",
        "x<y and y>z",
        "I <3 it",
        "5<=6",
        "the [red] one, [1, 2], [x], [A]",
        "a -> b",
    ):
        assert prompts.user_text(text).startswith(text + "\n")
