"""The `classify` backend: POST {base_url}/classify with chat messages, as vLLM takes them since its pull request 27516.

`r1v serve-reward` and `vllm serve` both speak it; `launch.vllm.judge_arguments` turns a vision-language model into a
classifier whose one class is P(Yes). Of several classes the last counts.
"""

from typing import Any

from ..core.prompts import messages_for
from .backends import HttpJudge
from .protocol import Failure, Question, Verdict, checked, with_images
from .replies import tokens

SUM_TOLERANCE = 0.01  # of probabilities in half precision


class ClassifyJudge(HttpJudge):
    """One request per judgement: the server batches."""

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
        for path in ("/info", "/v1/models"):
            try:
                document = await self.endpoint.request(path, None, lambda found: found)
                if path == "/info":
                    return dict(document["model"])
                return {"models": [[m["id"], m.get("root")] for m in document["data"]]}
            except Failure as failure:
                if failure.kind != "unparsable":
                    raise
            except (ValueError, TypeError, LookupError, AttributeError):
                pass
        return {}

    async def ask(self, question: Question) -> Verdict:
        messages = messages_for(self.prompt, question.problem, question.answer, len(question.images))
        messages = with_images(messages, (image.data_uri for image in question.images))
        body: dict[str, Any] = {"messages": messages, "add_generation_prompt": self.prompt == "judge"}
        body |= {"model": self.reward.model} if self.reward.model else {}
        body |= self.reward.request
        return await self.endpoint.request("/classify", lambda: body, self._verdict)

    def _verdict(self, document: Any) -> Verdict:
        """The probability of the last class; of one class alone its score, on the model's own scale."""
        data = document.get("data") if isinstance(document, dict) else None
        if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
            raise Failure("unparsable", f"no classification: {document!r}")
        if len(data) != 1:
            raise Failure("wrong_count", f"{len(data)} scores for one question")
        probs, classes = data[0].get("probs"), data[0].get("num_classes")
        if not isinstance(probs, list) or not probs:
            raise Failure("unparsable", f"no probs: {data[0]!r}")
        if classes is not None and (type(classes) is not int or classes != len(probs)):
            raise Failure("wrong_count", f"{len(probs)} probs of {classes!r} classes")
        # Several classes are probabilities, unless the request turns the softmax off.
        logits = self.reward.request.get("use_activation") is False
        scores = [checked(p, self.prompt == "judge" or (len(probs) > 1 and not logits)) for p in probs]
        if len(scores) > 1 and not logits and abs(sum(scores) - 1) > SUM_TOLERANCE:
            raise Failure("out_of_range", f"the probabilities of all classes sum to {sum(scores):.4g}, not 1")
        return Verdict(scores[-1], *tokens(document))
