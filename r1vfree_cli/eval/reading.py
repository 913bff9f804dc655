"""The rule judge: does a reply say yes, no, or neither? Three-valued, offline, and the same for every protocol."""

from __future__ import annotations

import re

from ..core.prompts import parse
from .hallusion.score import RIGHT, UNCLEAR, WRONG

YES, NO = "yes", "no"

_THINKING = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL | re.IGNORECASE)
_THOUGHT = re.compile(r"^.*</think>", re.DOTALL | re.IGNORECASE)  # where the chat template has opened it already
_TAG = re.compile(r"</?[a-z][^<>]{0,40}>|\\(?:boxed|text|textbf|mathbf)\b", re.IGNORECASE)
_CHOICE = re.compile(r"\b(?:yes\s*(?:/|\bor\b)\s*no|no\s*(?:/|\bor\b)\s*yes)\b")
_BOTH = re.compile(r"\byes\s+and\s+no\b|\bno\s+and\s+yes\b")
_EMPTY_NO = re.compile(r"\bno\s+(?:doubt|problem|matter|idea|clue|answer|way\s+to|information|data|wonder)\b")
_NUMBER = re.compile(r"\bno\.?\s*\d+")  # "No. 3"
_STATED = re.compile(
    r"\b(?:answer|verdict|conclusion|response|judge?ment)(?:\s+(?:is|would\s+be|should\s+be|must\s+be))?\s*[:=]?\s*"
    r"(?:definitely\s+|clearly\s+|simply\s+)?(yes|no)\b"
)
_SAID = {"yes": YES, "yeah": YES, "yep": YES, "no": NO, "nope": NO}
_FIRST = re.compile(r"\W*(yes|yeah|yep|no|nope)\b")
# A whole clause that is just yes or no: between punctuation marks or at an end.
_CLAUSE = re.compile(r"(?:^|[.!?,;:\n])\s*(?:then\s+|so\s+|but\s+)?(yes|yeah|yep|no|nope)\s*(?=[.!?,;:\n]|$)")
_TRUTH = re.compile(
    r"(?:^\W*|\b(?:is|are|was|be|it's|that's|seems|looks)\s+)"
    r"(?P<no>(?:(?:not|never|hardly)\s+)?)(?:(?:entirely|completely|quite|totally|indeed|also|actually|factually)\s+)*"
    r"(?P<word>correct|true|right|accurate|the\s+case|incorrect|false|wrong|inaccurate|untrue)\b"
    r"(?!\s+(?:of|to|next|here|there|behind|beside|under|side|above|below|hand|angle|triangle|order|if|that\s+there\s+(?:is|are)\s+no))"
)
_NEGATIVE = {"incorrect", "false", "wrong", "inaccurate", "untrue"}
_LONE_YES = re.compile(r"(?<!not )\b(yes)\b")
_LONE_NO = re.compile(r"\b(no)\b\s*(?=[.!?,;:\n]|$)|\bthere\s+(?:is|are|was|were)\s+(no)\b")


def read_yes_no(text: str) -> str | None:
    """`yes`, `no`, or None when the reply is unreadable, open or contradicts itself.

    The text inside the last `<answer>` is read where there is one, reasoning never. A stated answer, a leading yes or
    no and clauses that are only yes or no must agree; where there are none, "correct" and "not correct" count, then
    "there is no ..." and a lone yes or no.
    """
    text = _plain(text)
    if not text or _BOTH.search(text):
        return None
    said = {_SAID[word] for word in _STATED.findall(text)}
    if first := _FIRST.match(text):
        said.add(_SAID[first[1]])
    said |= {_SAID[word] for word in _CLAUSE.findall(text)}
    if said:
        return said.pop() if len(said) == 1 else None
    truth = {NO if (m["word"] in _NEGATIVE) != bool(m["no"].strip()) else YES for m in _TRUTH.finditer(text)}
    if truth:
        return truth.pop() if len(truth) == 1 else None
    lone = ({YES} if _LONE_YES.search(text) else set()) | ({NO} if _LONE_NO.search(text) else set())
    return lone.pop() if len(lone) == 1 else None


def without_thinking(text: str) -> str:
    """The reply without its reasoning: finished, unfinished, or opened by the chat template before the reply began."""
    return _THOUGHT.sub(" ", _THINKING.sub(" ", text))


def _plain(text: str) -> str:
    """Lower case, without reasoning, tags, emphasis, and set phrases in which yes and no are no answers."""
    answer = parse(text).answer
    if answer is None:
        answer = without_thinking(text)
        answer = answer[answer.rfind("<answer>") + len("<answer>") :] if "<answer>" in answer else answer
    plain = _TAG.sub(" ", answer).lower().replace("’", "'")
    plain = re.sub(r"n't\b", " not", plain.replace("can't", "can not"))
    plain = re.sub(r"[*_`#\"“”'‘{}()\[\]$|]+(?!s\b)", " ", plain)
    plain = _NUMBER.sub(" ", _EMPTY_NO.sub(" ", _CHOICE.sub(" ", plain)))
    return re.sub(r"[ \t]+", " ", plain).strip()


def rule_code(text: str, gt: int) -> int:
    """The rule judge's verdict: right, wrong, or unclear when no yes or no can be read."""
    reading = read_yes_no(text)
    if reading is None:
        return UNCLEAR
    return RIGHT if (reading == YES) == (gt == 1) else WRONG


def judged_text(reply: str, judge_input: str) -> str:
    """What a judge is shown: the whole reply, or its extracted answer (the whole reply where there is none)."""
    if judge_input == "reply":
        return reply
    answer = parse(reply).answer
    return reply if answer is None else answer
