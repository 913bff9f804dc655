"""Chat models as judges: the `chat` backend of the reward, and how any chat judge is asked and read.

A verdict is JSON where the endpoint can be held to it (`Endpoint.chat` steps down from json_schema to json_object to
text). A label in text counts only where it is stated as the verdict; any other mention of it is no verdict.
"""

import re
from typing import Any

from ..core.prompts import ASK_JSON, judge_text
from ..core.thinking import without_thinking
from .backends import HttpJudge
from .protocol import Failure, Question, Verdict, checked
from .replies import Reply, strict_json

JUDGE_TOKENS = 2048  # room for a judge that thinks before its verdict


def _schema(name: str, value: dict) -> dict:
    """JSON schema of an object with one property."""
    return {"type": "object", "properties": {name: value}, "required": [name], "additionalProperties": False}


VERDICT_SCHEMA = _schema("score", {"type": "number", "minimum": 0, "maximum": 1})

_FENCED = re.compile(r"(?s)```(?:json)?\s*(\{.*\})\s*```")
_NOUN = r"(?:label|verdict|judge?ment|answer|prediction|response|reply|result|conclusion|output|rating|grade)"
# In the sentence that states a label these make it another one; after a leading label they take it back.
_HEDGE = re.compile(
    r"n't\b|\b(?:not|never|cannot|neither|hardly|barely|scarcely|far|partial|partially|partly|mostly|almost|nearly|"
    r"somewhat|half|whether|if|unless|could|might|may|would|seems?|appears?|possibly|probably|perhaps|maybe|question|"
    r"reference|no|nobody|wrong|doubt\w*|mistake\w*|impossible|unlikely|hard|difficult|sa(?:ys?|id)|claims?|thinks?)\b"
)
_TAKEN_BACK = re.compile(
    r"\b(?:wait|actually|if|unless|not\s+(?:really|quite|entirely|fully|completely|so|at\s+all))\b|\bn't\s+(?:really|quite)\b|\?\s*$"
    r"|^\W*(?:not|no|nope|false|untrue|0)\W*$"
)
_WEAKENED = re.compile(  # "incorrect, but close" is incorrect; "correct, but in part" is no label
    r"\b(?:but|however|although|though|except|hardly|only\s+(?:if|when|for|in|to)|(?:un|not\s+)(?:sure|certain)|low\s+confidence|"
    r"(?:with|has|contains?|some|minor|small|few)\s+(?:(?!no\b)\w+\s+)?(?:errors?|mistakes?|flaws?|inaccuracies|problems?|issues?|reservations?|doubts?))\b"
    r"|^\W*(?:for\s+the\s+most\s+part|in\s+part|partial(?:ly)?|partly|mostly|mainly|largely|almost|nearly|somewhat|roughly|kind\s+of|sort\s+of|"
    r"more\s+or\s+less|in\s+(?:some|most)\s+(?:ways|parts|respects)|incomplete|doubtful|questionable|debatable|half|i\s+guess|maybe|perhaps|"
    r"possibly|probably)\b"
)
# Lines that take back what a line before them stated.
_RECANTED = re.compile(
    r"\b(?:wait|hold\s+on|hang\s+on|scratch\s+that|on\s+(?:second\s+thoughts?|reflection)|correction|let\s+me\s+re\w+|"
    r"i\s+(?:was|am)\s+(?:wrong|mistaken)|i\s+(?:take|took)\s+(?:that|it)\s+back)\b"
    r"|^\W*(?:not\s+(?:really|quite|exactly|entirely|at\s+all)|nope|actually|no\W*$|no\s*,)"
)
_NO_LABEL = re.compile(r"\bcorrect\s+(?:answer|response|one|option|label|value)\b")


def verdict_text(reply: Reply) -> str:
    """What a judge said after its thinking.

    Raises Failure: it was cut, ended for any reason but the usual one, or is empty.
    """
    if reply.finish == "length":
        raise Failure("truncated", f"cut at the token limit: {reply.text}")
    if reply.finish not in (None, "stop"):
        raise Failure("unfinished", f"finish_reason is {reply.finish!r}: {reply.text}")
    if reply.cause:
        raise Failure("empty", f"the reply has no text ({reply.cause})")
    return without_thinking(reply.text).strip()


def json_object(text: str) -> dict | None:
    """The JSON object that a verdict is, alone or in a code fence; None for text.

    Raises Failure: it has a key twice, or is JSON of another kind or no JSON although it opens like an object.
    """
    fenced = _FENCED.search(text)
    text = fenced[1] if fenced else text
    document = strict_json(text) if text.startswith("{") else None
    return document if isinstance(document, dict) else None


def stated_label(text: str, labels: dict[str, int]) -> int | None:
    """The label that a judge's reply states as its verdict; None when it states none, or more than one.

    Stated is: JSON with `label`; a line that is only the label; "Label: X", "the answer is X"; or a leading label, with
    its reason after it, that the reason does not take back.
    """
    try:
        document = json_object(text)
    except Failure:
        return None
    if document is not None:
        label = document.get("label")
        return labels.get(label.strip().lower()) if isinstance(label, str) else None
    plain = re.sub(
        r"</?\w+>|<\|\w+\|>|\\boxed|\\text\w*|[*_`\"“”#>{}]|(?<!\w)'|'(?!\w)", "", text.lower().replace("’", "'")
    ).strip()
    names = "|".join(map(re.escape, labels))
    found = set()
    says = (
        rf"(?:(?:[\w',]+\s+){{0,6}}?{_NOUN}\s*(?:is|:|=|-|would be)?\s*:?\s*|(?:this|it|that)(?:'s|\s+is)\s+|\d\.\s+)?"
    )
    stated = re.compile(rf"\W*(?:(?:so|thus|hence|therefore|overall)\W+)?{says}({names})[^\w?]*")
    for line in plain.splitlines():
        if (match := stated.fullmatch(line)) and not _HEDGE.search(line):
            found.add(match[1])
        elif found and _RECANTED.search(line):
            return None
    lead = re.match(rf"({says})({names})\s*(?:[–—:.,;(!\n]|-(?!\w)|because\b|since\b)(.*)", plain, re.DOTALL)
    if lead and not _HEDGE.search(lead[1]):
        said, rest = lead[2], _NO_LABEL.sub(" ", lead[3])
        others = "|".join(re.escape(name) for name in labels if name != said)
        weakened = said != "incorrect" and _WEAKENED.search(rest)
        if not weakened and not _TAKEN_BACK.search(rest) and not re.search(rf"\b(?:{others})\b", rest):
            found.add(said)
    return labels[found.pop()] if len(found) == 1 else None


def label_schema(labels: dict[str, int]) -> dict:
    """JSON schema of a verdict that is one of `labels`."""
    return _schema("label", {"type": "string", "enum": list(labels)})


class ChatJudge(HttpJudge):
    """One chat completion per judgement, at temperature 0 unless `request` says otherwise."""

    async def ask(self, question: Question) -> Verdict:
        text = judge_text(question.problem, question.answer, ASK_JSON)
        content: Any = [{"type": "image_url", "image_url": {"url": image.data_uri}} for image in question.images]
        content = [*content, {"type": "text", "text": text}] if content else text
        messages = [{"role": "user", "content": content}]
        return await self.endpoint.chat(
            messages, JUDGE_TOKENS, 0, _verdict, schema=VERDICT_SCHEMA, more=self.reward.request
        )


def _verdict(reply: Reply) -> Verdict:
    text = verdict_text(reply)
    document = json_object(text)
    if document is None or "score" not in document:
        raise Failure("unparsable", f"the verdict is no JSON with a score: {text!r}")
    return Verdict(checked(document["score"], bounded=True), reply.prompt_tokens, reply.completion_tokens)
