"""The `classify` backend: POST {base_url}/classify in the shape of vLLM's endpoint for chat messages.

`r1v serve-reward` and `vllm serve` both speak it. vLLM takes chat messages with images there since its pull request 27516
and turns a vision-language model into a classifier with `--runner pooling --hf-overrides '{"architectures":
["Qwen2_5_VLForSequenceClassification"], "classifier_from_token": ["No", "Yes"], "method": "from_2_way_softmax"}'`: its one
class is sigmoid(logit of Yes - logit of No) = P(Yes). (`no_post_processing` looks for the tokens in the text config only,
where this does not put them.) Of several classes the last counts.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field

from ..core.prompts import messages_for
from .client import HttpJudge, Reply
from .protocol import Failure, Question, checked


class _Data(Reply):
    probs: list[Any] = Field(min_length=1)


class _Classification(Reply):
    data: list[_Data]


class ClassifyJudge(HttpJudge):
    """One request per judgement: the server batches."""

    path = "/classify"

    async def open(self) -> None:
        await super().open()
        served = await self._served()
        if self.reward.prompt != "auto":
            self.prompt = self.reward.prompt
        elif served.get("prompt") == "conversation":
            self.prompt = "conversation"
        if not self.reward.serve:
            self.identity = {"served": served}

    async def _served(self) -> dict:
        """What the server says of its model: r1v's at /info, vLLM at /v1/models; {} when it says nothing.

        A server that is down must not be taken for one that says nothing: its `Failure` goes on.
        """
        try:
            return dict(json.loads(await self._send("GET", "/info", optional=True))["model"])
        except (ValueError, TypeError, KeyError):
            pass
        try:
            models = json.loads(await self._send("GET", "/v1/models", optional=True))["data"]
            return {"models": [[m["id"], m.get("root")] for m in models]}
        except (ValueError, TypeError, KeyError, AttributeError):
            return {}

    def body(self, question: Question) -> dict:
        messages = messages_for(self.prompt, question.problem, question.answer, len(question.images))
        images = iter(question.images)
        for message in messages:
            message["content"] = [
                {"type": "image_url", "image_url": {"url": next(images).data_uri}} if part["type"] == "image" else part
                for part in message["content"]
            ]
        model = {"model": self.reward.model} if self.reward.model else {}
        asked = {"messages": messages, "add_generation_prompt": self.prompt == "judge"}
        return {**model, **asked, **self.reward.request}

    def read(self, document: Any) -> float:
        reply = _Classification.model_validate(document)
        if len(reply.data) != 1:
            raise Failure("wrong_count", f"{len(reply.data)} scores for one question")
        return checked(reply.data[0].probs[-1], bounded=self.prompt == "judge")
