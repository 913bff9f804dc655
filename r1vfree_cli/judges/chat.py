"""The `chat` backend: any OpenAI-compatible chat endpoint that takes images, asked for a JSON verdict."""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field

from ..core.prompts import ASK_JSON, judge_text
from .client import HttpJudge, Reply
from .protocol import Failure, Question, checked

VERDICT_SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "number", "minimum": 0, "maximum": 1}},
    "required": ["score"],
    "additionalProperties": False,
}


class _Message(Reply):
    content: str | None = None
    refusal: str | None = None


class _Choice(Reply):
    message: _Message
    finish_reason: str | None = None


class _Completion(Reply):
    choices: list[_Choice] = Field(min_length=1, max_length=1)


class _Score(Reply):
    score: int | float


class ChatJudge(HttpJudge):
    """One chat completion per judgement, at temperature 0 unless `request` says otherwise."""

    path = "/chat/completions"

    def body(self, question: Question) -> dict:
        content: list[dict] = [{"type": "image_url", "image_url": {"url": i.data_uri}} for i in question.images]
        content.append({"type": "text", "text": judge_text(question.problem, question.answer, ASK_JSON)})
        schema = {"name": "verdict", "strict": True, "schema": VERDICT_SCHEMA}
        return {
            "model": self.reward.model,
            "messages": [{"role": "user", "content": content}],
            "response_format": {"type": "json_schema", "json_schema": schema},
            "temperature": 0,
            **self.reward.request,
        }

    def read(self, document: Any) -> float:
        reply = _Completion.model_validate(document)
        choice = reply.choices[0]
        if choice.message.refusal or choice.finish_reason == "content_filter":
            raise Failure("refusal", choice.message.refusal or "filtered")
        if choice.finish_reason == "length":
            raise Failure("truncated", "the verdict was cut at the token limit")
        try:
            verdict = json.loads(choice.message.content or "")
        except (ValueError, RecursionError):
            raise Failure("unparsable", f"verdict is not JSON: {choice.message.content or ''!r}") from None
        return checked(_Score.model_validate(verdict).score, bounded=True)
