"""A judge model in this process: scores (images, question, answer) in batches. `checkpoint` tells its kinds."""

import copy
from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..core.errors import DataError
from ..core.prompts import as_data, messages_for
from ..models import family
from ..models.load import load_model, open_processor, render, settle_thinking, unsharded
from ..models.sampling import usable
from ..shared_prefix.attention import install, not_shared
from ..shared_prefix.pack import lay_out, tree_of
from .kinds import VALUE_HEAD, checkpoint_file, detect_kind, prompt_of, unloadable
from .protocol import Failure, checked, image_digest

CHARS_A_TOKEN = 128  # of the longest tokens, which are spaces
MAX_TOKENS = 8192  # longest prompt, where the model's own length is not less
BATCH_TOKENS = 16384  # of one batch, padding included: what bounds its memory

Item = tuple[Sequence[Image.Image], str, str]  # images, question, answer
Request = tuple[Sequence[Image.Image], list[dict]]  # images, messages with a placeholder for each


class LocalJudge:
    """A loaded judge.

    Args:
        model: folder or hub name.
        device, dtype: by default the current GPU and bfloat16, else the CPU and float32.
        batch_size: most judgements in one forward pass.
        pixels: fewest and most pixels of an image after resizing; None keeps the checkpoint's own limits.
        max_tokens: longest prompt; None is the model's own length, at most `MAX_TOKENS`.

    Raises DataError: the checkpoint cannot be loaded whole, sees no images, or cannot tell Yes from No.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        batch_size: int = 32,
        pixels: tuple[int, int] | None = None,
        max_tokens: int | None = None,
    ):
        self.name = model
        self.kind = detect_kind(model, revision)
        self.prompt = prompt_of(self.kind)
        self.batch_size = batch_size
        self.tokens = 0  # text and image tokens of all prompts so far, each computed once
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.processor = open_processor(model, what=f"judge {model}", revision=revision)
        settle_thinking(self.processor, judge=True)
        with unsharded():
            loaded = load_model(
                model,
                what=f"judge {model}",
                revision=revision,
                dtype=dtype or ("bfloat16" if self.device.type == "cuda" else "float32"),
                loader="AutoModelForSequenceClassification" if self.kind == "classification" else None,
                foreign=("v_head.",) if self.kind == "value_head" else (),
            )
        self.model = loaded.to(self.device).eval().requires_grad_(False)
        kind = family.of(self.model.config)
        # A classification head takes the last token of a row, whose branches it does not know.
        self._shares = self.kind != "classification" and not_shared(self.model) is None
        if self._shares:
            install(self.model)
        if pixels:
            family.limit_pixels(kind, self.processor, *pixels)
        own = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or MAX_TOKENS
        self.max_tokens = min(max_tokens or MAX_TOKENS, own)
        self.processor.tokenizer.padding_side = "left"
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        # Counts tokens in other threads: a tokenizer that pads cannot be asked by two at once.
        self._counter = copy.deepcopy(self.processor.tokenizer)
        if self.kind == "yes_no":
            words = ("Yes", "No")
            self._yes, self._no = (self._counter.encode(w, add_special_tokens=False)[0] for w in words)
            if self._yes == self._no:
                raise DataError(f"judge {model}: its tokeniser begins Yes and No with the same token")
        elif self.kind == "value_head":
            self._weight, self._bias = _read_value_head(model, revision, self.device)

    def score(self, items: Sequence[Item]) -> list[float | Failure]:
        """A score, or why there is none, for each (images, question, answer), in order; equal ones are computed once."""
        requests = [(images, messages_for(self.prompt, q, a, len(images))) for images, q, a in items]
        return self.score_messages(requests, add_generation_prompt=self.prompt == "judge")

    def score_messages(self, requests: Sequence[Request], *, add_generation_prompt: bool) -> list[float | Failure]:
        """`score` for conversations that are already written, as a server gets them. Their text stays data."""
        wanted: dict[tuple, tuple[int, Sequence[Image.Image]]] = {}
        places: list[Any] = []  # text and images of each request, or why it is none
        for images, messages in requests:
            try:
                text = self._render(messages, add_generation_prompt)
                length = self._length(text, images)
                places.append(place := (text, tuple(map(image_digest, images))))
                wanted[place] = length, images
            except Failure as failure:
                places.append(failure)
        found: dict[Any, float | Failure] = {place: place for place in places if isinstance(place, Failure)}
        rows = [(key, *row) for key, row in wanted.items()]
        while rows:
            taken = next_batch([length for _, length, _ in rows], [key[1] for key, *_ in rows], self.batch_size)
            part = [rows[i] for i in taken]
            rows = [row for i, row in enumerate(rows) if i not in set(taken)]
            scores = self._scores([(*key, images) for key, _, images in part])
            found.update(zip((key for key, *_ in part), scores, strict=True))
        return [found[place] for place in places]

    def length(self, request: Request, *, add_generation_prompt: bool) -> int:
        """Tokens of a request, those of its images included. Any thread may ask.

        Raises Failure: the template cannot write it, it is longer than `max_tokens`, or its images fit no model.
        """
        images, messages = request
        return self._length(self._render(messages, add_generation_prompt), images)

    def _length(self, text: str, images: Sequence[Image.Image]) -> int:
        if len(text) > CHARS_A_TOKEN * self.max_tokens:  # tokens of megabytes take minutes to count, and gigabytes
            raise Failure("too_long", f"a prompt of {len(text)} characters; at most {self.max_tokens} tokens are taken")
        found = len(self._counter.encode(text))
        if images:
            sizes = [(image.height, image.width) for image in images]
            try:
                counts = self.processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
            except ValueError as e:  # sides of 1 to 200 and beyond
                raise Failure("image", str(e)) from None
            found += sum(counts) - len(images)  # each has one placeholder already
        if found > self.max_tokens:
            raise Failure("too_long", f"a prompt of {found} tokens; at most {self.max_tokens} are taken")
        return found

    def _scores(self, rows: list[tuple[str, tuple, Sequence[Image.Image]]]) -> list[float | Failure]:
        """One batch. One that fails is asked again row by row, so that no row takes the others along."""
        try:
            with torch.inference_mode():
                scores = self._forward(*map(list, zip(*rows))).tolist()
        except (RuntimeError, ValueError, IndexError) as e:
            if len(rows) > 1:
                return [score for row in rows for score in self._scores([row])]
            return [Failure("local_error", f"{type(e).__name__}: {e}"[:300])]
        return [self._checked(score) for score in scores]

    def _checked(self, score: float) -> float | Failure:
        try:
            return checked(score, bounded=self.prompt == "judge")
        except Failure as failure:
            return failure

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        def safe(part: dict) -> dict:
            return part | {"text": as_data(part["text"])} if part["type"] == "text" else part

        said = [m | {"content": [safe(part) for part in m["content"]]} for m in messages]
        try:
            return render(self.processor, said, add_generation_prompt=add_generation_prompt, what=f"judge {self.name}")
        except DataError as e:
            raise Failure("template", e.message) from None

    def _forward(self, texts: list[str], keys: list[tuple], images: list[Sequence[Image.Image]]) -> torch.Tensor:
        if self._shares:
            return self._forward_shared(texts, keys, images)
        given = {"images": [list(group) for group in images]} if any(images) else {}
        inputs = dict(self.processor(text=texts, padding=True, return_tensors="pt", **given).to(self.device))
        self.tokens += int(inputs["attention_mask"].sum())
        if self.kind == "classification":
            logits = self.model(**inputs, use_cache=False).logits.float()  # (B, labels)
            if logits.shape[-1] == 1:
                return logits[:, 0]
            return logits.softmax(-1).masked_fill(~usable(logits), torch.nan)[:, -1]
        return self._head(inputs, 1)[:, -1]

    def _head(self, inputs: dict[str, Any], keep: int | torch.Tensor) -> torch.Tensor:
        """Scores (B, kept) after the last `keep` tokens, or after those at its places."""
        if self.kind == "value_head":
            hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state  # (B, L, H)
            hidden = hidden[:, -keep:] if isinstance(keep, int) else hidden[:, keep]
            scores, outputs = hidden.float() @ self._weight + self._bias, hidden
        else:
            outputs = self.model(**inputs, use_cache=False, logits_to_keep=keep).logits  # (B, kept, V)
            scores = outputs[..., [self._yes, self._no]].float().softmax(-1)[..., 0]
        return scores.masked_fill(~usable(outputs)[..., 0], torch.nan)

    def _forward_shared(self, texts: list[str], keys: list[tuple], images: list[Sequence[Image.Image]]) -> torch.Tensor:
        """Scores (B,). The answers of a group share image and question: what is equal is computed once."""
        distinct = dict(zip(keys, images, strict=True))
        shown = [image for group in distinct.values() for image in group]
        pixels, grid = torch.empty(0), torch.empty(0, 3, dtype=torch.long)
        if shown:
            given = self.processor.image_processor(images=shown, return_tensors="pt")
            pixels, grid = given["pixel_values"], given["image_grid_thw"]  # (patches, X), (images, 3)
        patches = grid.prod(-1)
        sizes = (patches // self.processor.image_processor.merge_size**2).tolist()
        starts = dict(zip(distinct, accumulate(map(len, distinct.values()), initial=0), strict=False))
        groups = defaultdict[tuple, list](list)
        for row, (text, key) in enumerate(zip(texts, keys, strict=True)):
            ids, end = self._expanded(text, sizes[starts[key] :])
            self.tokens += len(ids)
            groups[key, tuple(ids[:end])].append((row, ids))
        trees, order, which = [], [], list[int]()
        for (key, _), rows in groups.items():
            own = range(starts[key], starts[key] + len(key))
            trees.append(tree_of([ids for _, ids in rows], grid[own]))
            order += [row for row, _ in rows]
            which += own
        inputs, layout, ends = lay_out(self.model.base_model, trees, self.device)
        if which:
            parts = pixels.split(patches.tolist())
            inputs["pixel_values"] = torch.cat([parts[i] for i in which]).to(self.device)
            inputs["image_grid_thw"] = grid[which].to(self.device)
        scores = self._head({**inputs, "shared_prefix": layout}, ends)[0]
        layout.assert_used(self.model.config.get_text_config().num_hidden_layers)
        return scores[torch.tensor(order).argsort().to(self.device)]

    def _expanded(self, text: str, sizes: Sequence[int]) -> tuple[list[int], int]:
        """Token ids with as many placeholders for each image as it has tokens, and where the last one ends."""
        ids, end, left = list[int](), 0, iter(sizes)
        for token in self.processor.tokenizer.encode(text):
            if token == self.processor.image_token_id:
                ids += [token] * next(left)
                end = len(ids)
            else:
                ids.append(token)
        return ids, end


def next_batch(lengths: Sequence[int], mates: Sequence[Hashable], most: int) -> list[int]:
    """Places of the rows of the next batch: shortest first, each followed by its `mates`, rows of the same key.

    At most `most` rows and `BATCH_TOKENS` tokens with padding, none of them padded to much over twice its length: what
    bounds memory also where nothing turns out to be shared.
    """
    shortest: dict[Hashable, int] = {}
    for length, key in zip(lengths, mates, strict=True):
        shortest[key] = min(length, shortest.get(key, length))
    rank = {key: i for i, key in enumerate(sorted(shortest, key=shortest.__getitem__))}
    order = sorted(range(len(lengths)), key=lambda i: (rank[mates[i]], lengths[i]))
    taken, longest = order[:1], lengths[order[0]]
    widest = 2 * longest + 64
    for i in order[1:]:
        padded = max(longest, lengths[i])
        if len(taken) < most and padded <= widest and (len(taken) + 1) * padded <= BATCH_TOKENS:
            taken.append(i)
            longest = padded
    return taken


def _read_value_head(model: str, revision: str | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (H,) and bias () of the linear head, in float32 as TRL keeps it."""
    path = checkpoint_file(model, VALUE_HEAD, revision)
    assert path is not None
    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as e:
        raise unloadable(model, f"{path.name}: {e}") from None
    weight = [t for name, t in tensors.items() if name.endswith("summary.weight")]
    bias = [t for name, t in tensors.items() if name.endswith("summary.bias")]
    if len(weight) != 1 or weight[0].shape[0] != 1:
        raise DataError(f"{path.name} of judge {model} holds no v_head.summary.weight of shape (1, hidden size)")
    return weight[0][0].float(), bias[0][0].float() if bias else torch.zeros((), device=device)
