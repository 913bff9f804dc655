"""Yes and no are read alike: every frame of a table with every answer, and what is no verdict at all."""

from __future__ import annotations

import itertools
from copy import copy

import pytest

from r1vfree_cli.eval import reading, result
from r1vfree_cli.eval.hallusion.benchmark import BENCHMARK
from r1vfree_cli.eval.hallusion.questions import Question
from r1vfree_cli.eval.hallusion.score import Item

# Frames that are read: the verdict put in is the verdict read.
READ = [
    "{}", "{}.", "{}!", "{},", " {} ", "\n{}\n", "**{}**", "*{}*", "__{}__", "`{}`", '"{}"', "'{}'", "“{}”", "({})", "[{}]", "{{{}}}",
    "# {}", "> {}", "- {}", "<b>{}</b>", "<|begin_of_box|>{}<|end_of_box|>", "{}<|im_end|>", "{}</s>", "<|im_start|>{}<|im_end|>",
    "\\boxed{{{}}}", "$\\boxed{{\\text{{{}}}}}$", "\\(\\boxed{{\\mathrm{{{}}}}}\\)", "\\text{{{}}}", "\\textbf{{{}}}", "&quot;{}&quot;",
    "<answer>{}</answer>", "<answer>\n{}.\n</answer>", "<answer>{}", "<think>yes no</think>{}", "<thinking>no. yes.</thinking>\n{}",
    "<reasoning>The answer is yes.</reasoning> {}", "no, yes</think>{}", "<|begin_of_thought|>no<|end_of_thought|>{}", "[THINK]no[/THINK]{}",
    "<|channel|>analysis<|message|>yes, no<|end|><|start|>assistant<|channel|>final<|message|>{}",
    "No image is provided, but my answer is {}.", "{}, there is no picture on the wall.", "{}, the figure is not shared by both.",
    "{}, it is so.", "{}; the bar is there.", "{}: the bar is there.", "{} - the bar is there.", "{} — the bar is there.",
    "{} the bar is there", "{} it is wrong", "{} because it is red", "{}\nThe bar is there.", "{} (see the chart)",
    "I would say {}", "I would say {} here", "I'd say {}.", "my choice: ({}) because the bar is red", "My choice is {}", "I choose {}.",
    "I believe the answer is {}", "The answer is {}.", "The answer is: {}", "The answer is **{}**.", 'The answer is "{}".', "Answer: {}",
    "Answer = {}", "**Answer:** {}", "### Answer\n{}", "Answer:\n\n{}", "The answer to the question is {}.", "The correct answer is {}",
    "The answer should be {}", "The answer is therefore {}.", "The answer is a clear thing: {}", "Final answer: {}", "**Final Answer**\n\n{}",
    "Final verdict: {}.", "Conclusion: {}", "In conclusion, {}.", "My verdict: {}", "So, {}.", "Therefore, {}", "so {}", "Hence: {}",
    "Based on the chart, {}", "Based on the chart, the answer is {}.", "The bars are red, so {}.", "Well, {}.", "Hmm... {}.",
    "A. {}", "(B) {}", "The answer is (A) {}", "The answer is B. {}", "Option A: {}", '{{"answer": "{}"}}', "{{'answer': '{}'}}", "answer={}",
    "Yes or no? {}", "Answer yes or no: {}", "(yes/no) {}", "It's a {}.", "That is a {} from me", "{} is my answer", "{} is the answer.",
    "Is the left one larger? No. Is the right one? Yes. The answer is {}.", "Is it? Yes. Is it not? No. Final answer: {}",
    "Yes, at first sight. But the bar is red. Final answer: {}", "No, wait, look again. The answer is {}.",
    "Some would say yes, others no, but the answer is {}.", "The sign does not move, the answer is {}.", "I am not certain. Answer: {}",
    "答案是{}。", "答案：{}", "最终答案：{}", "因此，{}。", "所以答案是{}。", "我的答案是：{}", "答案为 {}", "**答案：{}**", "{}，图中如此。",
    "I'd go with {} here.", "It's {}.", "I lean towards {}.", "I vote {}.", "Probably {}.", "{} of course", "Of course, {}.", "Without a doubt, {}.",
    "No doubt about it: {}", "Short answer: {}. Long answer: it depends on the angle.", "A: {}", "Q: Is it? A: {}", "1. {}", "=> {}", "→ {}", "✅ {}",
    "Response: {}", "```\n{}\n```", '```json\n{{"answer": "{}"}}\n```', '{{"final_answer": "{}", "confidence": 0.9}}', "[ANSWER]{}[/ANSWER]",
    '{{"reasoning": "no bar is red. Yes?", "answer": "{}"}}', "Reasoning: no, it is not; yes, it is.\n\nFinal answer: {}", "{}<eos>", "<s> {} </s>",
    "{}<end_of_turn>", "{}, the bars are not the same.", "{}, there is no such object.", "{}! No bar is red.", "{} (confidence: 90%)", "The answer (yes or no) is {}.",
    "Some people say yes. I say {}.", "You might think no, but it's actually {}.", "It looks like yes, but the answer is {}.", "The sign says no, but my answer is {}",
    "At first I thought yes, but then no. Final answer: {}.", "I would not say no lightly. The answer is {}.", "Don't answer maybe. {}.",
    "It looks like {}", "It seems to be {}", "It looks like the answer is {}.", "It appears that the answer is {}", "As could be seen the answer is {}",
    "<caption>no person</caption>{}", "<summary>Yes. No.</summary> {}", "<critique>no</critique><answer>{}</answer>", "<observation>no</observation>{}",
    "<SUMMARY>No.</SUMMARY><CAPTION>yes</CAPTION><REASONING>no</REASONING><CONCLUSION>{}</CONCLUSION>", "<final_answer>{}</final_answer>", "<choice>{}</choice>",
    "{}, if you look closely.", "{}, even if it looks curved.", "If I had to guess, {}.", "Final answer: {}, as if it were drawn.", "<{}>", "Answer: <{}>",
    "The answer is {}. If the bar were red, the answer would be another.", "{}, the image does not show a dog.", "{}, there is no image of a dog.",
    "{}, I can not see any dog in the image.", "{}, the picture is missing a leg.", "{}, the figure is not visible in the mirror.", "{} in the picture, as drawn",
    "{}, no bar is red", "{}, no image attached to the wall is red", "{0} {0}", "{0} {0} {0}", "{0}, {0}, {0}!", "Yes, no? {}", "是/否：{}", "是或否: {}", "{}, but it's not red.", "At first it looks like yes, but it's not. The answer is {}.",
]  # fmt: skip
# Tags of reasoning, as models write them: what is inside is never read, closed, open, or closed only.
THOUGHT = ["think", "thinking", "Thinking", "thought", "thoughts", "thought_process", "reason", "reasoning", "REASONING", "rationale", "reflection", "reflect",
           "analysis", "scratchpad", "cot", "inner_monologue", "internal_thoughts", "rethink", "seed:think", "self-reflection", "think time=3"]  # fmt: skip
# Frames in which a verdict is negated, supposed, asked or no verdict: never the one put in, never the other.
UNREAD = [
    "{}, I can't see any image attached", "{}. I was not given an image", "{} изображения", "{} é possível", "It looks like yes, but it's not{:.0}",
    "Yes, but it isn't.{:.0}", "No, but it is.{:.0}", "Yes, but that is not true{:.0}",
    "I would not say {}", "I wouldn't say {}.", "The answer is not {}.", "The answer isn't {}", "I don't think the answer is {}",
    "It cannot be {}.", "I can't say {}", "Not {}.", "Neither {} nor anything", "Never {}", "not a {}", "I would not say ({})",
    "It would be wrong to say {}", "{} is not the answer", "{} would be wrong", "The wrong answer is {}", "anything but {}",
    "If {}, then the bar is red", "whether {} I can't tell", "{}?", "Is it {}?", "The answer is {}?", "<think>{}", "<thinking>{}", "<reasoning>{}</reasoning>",
    "<think>{}</think>", "The answer is {}</think>", "{} context", "{} response", "{} image provided.", "{}. 3 is larger", "a {}-go area",
    "Yes or no? I cannot say.{0:.0}", "Yes. No. {}", "Yes and no, {}", "I'd hesitate to say {}.", "Far from {}", "The answer is far from {}.",
    "There's no way the answer is {}", "By no means {}", "Under no circumstances {}", "Nobody would say {}.", "It would be a mistake to say {}", "opposite: {}",
    "I doubt that it is {}.", "It is unlikely that the answer is {}.", "The answer can't possibly be {}", "I refuse to say {}.", "I can't give a definite {}.",
    "Maybe {}, maybe not", "Perhaps {}.", "It could be {}.", "It might be {}", "The answer may be {}", "I can't tell, the answer may be {}.", "The answer is either {}",
    "Wrong answer: {}", "An incorrect answer would be {}", "Please answer {} if you can see it", "The answer is {} or something else",
    "The student said {}.", "He says {}", "They voted {}", "Some would say {}.", "You asked me to say {}", 'The sign says "{}".', 'The word "{}" is on it', "It is labelled {}",
    "The answer is {0} or {0}", "{} can't be right.", "{} isn't the right answer.", '"{}" is wrong.', "{} smoking sign", "{} entry", "{}?!",
    "我不会说{}", "答案不是{}。", "答案可能是{}", "如果{}，则为红色",
    "{}, there is no image provided.", "{}. No image was provided.", "{}, I cannot see the image.", "{}, no context is given to me.",
    "{} - the picture was not attached.", "I can't view this image, so {}.", "{}, since no image has been uploaded", "{}，没有提供图片。",
    "{}, there is no image.", "{}, there is no image available.", "{}. No image.", "{}, there is no accompanying picture.", "{}, the image is missing.",
    "{}, the image did not load.", "{}, the photo failed to load.", "{}, you haven't provided an image.", "{}, I see no image.", "{}, no context.",
    "{}, I'm unable to see the image.", "{}, as a text model I cannot see images.", "{}, the picture isn't visible to me.", "{}. There is no visual content.",
    "{}, without the image I can't tell.", "{}, I don't have access to the image.", "{}. I can't assist with that.", "{}，图片没有加载。", "{}，我看不到图片。",
    "I disagree with the answer {}.", "Saying {} is a mistake", "I rule out {}.", "{} is ruled out.", "It is false that the answer is {}.", "I oppose {}",
    "I fail to see why {}.", "It's a lie to say {}.", "The answer excludes {}", "It is not true that the answer is {}.", "Both {} or whatever",
    "{}, if the lines are equal.", "{}, unless the bars overlap.", "If the lines are equal, then {}.", "Unless it's rotated, {}.", "Provided it is straight, {}",
]  # fmt: skip
PAIRS = [("yes", "no"), ("Yes", "No"), ("YES", "NO"), ("yeah", "nah"), ("Yep", "Nope")]
LANGUAGES = [
    ("Oui", "Non"),
    ("Sí", "No"),
    ("Sim", "Não"),
    ("Ja", "Nein"),
    ("Да", "Нет"),
    ("はい", "いいえ"),
    ("네", "아니요"),
]
CHINESE = [
    ("是", "否"),
    ("是的", "不是"),
    ("有", "没有"),
    ("对", "不对"),
    ("正确", "错误"),
    ("对", "不"),
    ("存在", "不存在"),
    ("没错", "错"),
    ("對", "不對"),
    ("有的", "沒有"),
]
CHINESE_FRAMES = [
    "{}", "{}。", "{}，图中如此。", "**{}**", "“{}”", "({})", "答案是{}。", "答案：{}", "答案是：{}", "最终答案：{}", "最终答案是{}",
    "我的回答是{}", "因此，{}。", "所以，{}", "我认为{}。", "<answer>{}</answer>", "<think>没有，是的</think>{}", "\\boxed{{{}}}",
    "<|begin_of_box|>{}<|end_of_box|>", "图片很清楚。{}。", "Answer: {}", "Final answer: {}", "答案为：{}", "综上，答案是{}。", "因此，答案是“{}”。", "我认为答案是{}。", "回答：{}",
    "左边大吗？是。右边大吗？不是。答案是：{}。", "左边大吗？有。最终答案：{}", "当然{}。", "看起来{}。", "【答案】{}", "结论是{}", "{}，左边更大。", "\\boxed{{\\text{{{}}}}}",
]  # fmt: skip
ABSENT = [
    "There is no image provided.", "No context.", "No response", "Cannot be determined; there is no image.", "No image.",
    "No image is attached to your message.", "There is no image here.", "There's no picture in the prompt.", "No answer", "No information.",
    "There is no information in the image.", "There is no evidence of this in the picture.", "no data available", "No idea.", "No clue",
    "No further details are given", "No such chart exists", "No longer visible", "No one knows.", "No way to tell.", "N/A", "None", "null",
    "There is no context to answer this question.", "I see no image.", "With no image I cannot answer.", "No file was uploaded.",
    "There are no visual details from which to tell.", "No attachment", "NO IMAGE PROVIDED", "**No** image", "There was no upload.",
    "It is unclear whether the statement is true.", "I cannot say that it is correct.", "It cannot be determined if it is correct.",
    "是吗？", "是不是？", "有没有？", "是否？", "对吗？", "是/否", "是或否？我无法回答。", "不能说是。", "我不认为是。", "答案不是“是”。", "我不会说“没有”。", "如果是，则为红色",
    "没有足够的信息。", "图片中没有足够的信息来回答", "没有图片。", "没有提供图片，无法回答。", "对不起，我无法回答。", "不确定。", "不知道", "没有，没有图片。", "未提供图片。",
    "Both yes and no.", "yes | no", "yes > no", "no == yes", "Half yes half no", "More yes than no.", "The answer is less yes than no",
    "There is no content in the image.", "There are no visual cues in the image.", "There is no support for this in the image.", "Certainly! Here is how.", "无法确定", "这是一张图。",
]  # fmt: skip


def put(frame: str, answer: str) -> str | None:
    return reading.read_yes_no(frame.format(answer))


@pytest.mark.parametrize("frame", READ)
def test_a_frame_reads_both(frame):
    assert [(put(frame, yes), put(frame, no)) for yes, no in PAIRS] == [("yes", "no")] * len(PAIRS)


@pytest.mark.parametrize("frame", UNREAD)
def test_a_frame_that_is_no_verdict_reads_neither(frame):
    assert [(put(frame, yes), put(frame, no)) for yes, no in PAIRS] == [(None, None)] * len(PAIRS)


@pytest.mark.parametrize("frame", CHINESE_FRAMES)
def test_chinese(frame):
    assert [(put(frame, yes), put(frame, no)) for yes, no in CHINESE] == [("yes", "no")] * len(CHINESE)


@pytest.mark.parametrize(("yes", "no"), LANGUAGES)
def test_other_languages(yes, no):
    for frame in (
        "{}",
        "{}.",
        "{}, x.",
        "**{}**",
        "\\boxed{{{}}}",
        "<answer>{}</answer>",
        "Answer: {}",
        "<think>yes</think>{}",
    ):
        assert (put(frame, yes), put(frame, no)) == ("yes", "no"), frame
    assert put("I would not say {}", yes) is put("I would not say {}", no) is None


@pytest.mark.parametrize("reply", ABSENT)
def test_absence_and_doubt_are_no_verdict(reply):
    assert reading.read_yes_no(reply) is None


@pytest.mark.parametrize("tag", THOUGHT)
@pytest.mark.parametrize("inside", ["yes", "no", "The answer is yes.", "Final answer: no", "否"])
def test_reasoning_is_not_read_under_any_name(tag, inside):
    name = tag.split()[0]
    for a in ("yes", "no"):
        for reply in (
            f"<{tag}>{inside}</{name}>{a}",
            f"{inside}</{name}>\n\n{a}",
            f"{a} <{tag}>{inside}",
            f"<{tag}>x</{name}><answer>{a}</answer>",
        ):
            assert reading.read_yes_no(reply) == a, reply
    for reply in (f"<{tag}>{inside}", f"<{tag}>{inside}</{name}>", f"{inside}</{name}>"):
        assert reading.read_yes_no(reply) is None, reply


def test_frames_in_frames_are_mirror_images():
    mirror = {"yes": "no", "no": "yes", None: None}
    frames = [frame for frame in READ + UNREAD if "<" not in frame and "\\" not in frame]
    for outer, inner in itertools.product(frames[::5], frames[1::4]):
        frame = (
            outer.format(inner.replace("{", "{{").replace("}", "}}").replace("{{}}", "{}"))
            if "{0" not in outer + inner
            else outer
        )
        try:
            a, b = frame.format("yes"), frame.format("no")
        except (ValueError, IndexError, KeyError):
            continue
        if any(word in frame.lower() for word in ("yes", "no", "wrong")):
            continue  # a verdict of its own
        assert reading.read_yes_no(a) == mirror[reading.read_yes_no(b)], frame


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("I would not say yes, I would say no.", "no"),
        ("The answer is not no, it is yes.", "yes"),
        ("A. Yes\nB. No\n\nAnswer: B", "no"),
        ("A. No\nB. Yes\n\nThe answer is B.", "yes"),
        ("Answer: False", "no"),
        ("Answer: True", "yes"),
        ("It cannot be correct.", None),
        ("That's correct, I'd say no", None),
        ("Yes. The answer is no.", None),
        ("\\boxed{yes} and \\boxed{no}", None),
        ("There is **no** bar in the image.", "no"),
        ("Definitely not.", "no"),
        ("I do not think so.", "no"),
        ("I think so!", "yes"),
        ("这个说法是错误的。", "no"),
        ("该说法正确。", "yes"),
    ],
)
def test_several_verdicts(reply, expected):
    assert reading.read_yes_no(reply) == expected


def code(reply: str, reader: str) -> int:
    """The verdict on a reply to a question whose answer is yes."""
    benchmark = copy(BENCHMARK)
    benchmark.reader = reader
    return benchmark.code(Question(Item("VD", "ocr", "0", "0", "0", 1, 1), "Is it?", None, None), reply)


def test_the_share_of_unread_replies():
    def share(texts: list[str], reader="r1v"):
        codes = [code(text, reader) for text in texts]
        return result.answer_format([{"model_prediction": text} for text in texts], codes)["unreadable_share"]

    assert share(["Yes", "hm", "No", "No image."]) == 0.5
    assert share([]) is None
    assert share(["<b>yes</b>", "yes and no"], "vlmevalkit") == 0.5


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Yes", "yes"),
        ("No image is given.", "no"),
        ("Yes, no", None),
        ("yes,it is", "yes"),
        ("Nope", None),
        ("<answer>No</answer>", "no"),
        (
            "<answer>No</answer> ok",
            None,
        ),  # ">" stands beside a space somewhere, so all of them vanish: "answerno/answer"
        ("yes/no", None),
        ("It has 1,000 bars;yes", None),  # with such a number every mark vanishes
        ("no.3", None),
        ("not", None),
        ("*No*", None),
        ("a. " * 32 + "yes.", None),  # the 33rd full stop stays
        ("a. " * 31 + "yes.", "yes"),
        ("", None),
    ],
)
def test_the_rule_of_vlmevalkit(reply, expected):
    assert reading.read_vlmevalkit(reply) == expected
    assert code(reply, "vlmevalkit") == {"yes": 1, "no": 0, None: 2}[expected]
