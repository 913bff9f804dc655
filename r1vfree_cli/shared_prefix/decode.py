"""Generation for groups: each distinct prompt is prefilled once, then all branches are decoded together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..core import console
from ..core.errors import first_line
from ..models.sampling import draw
from .attention import assert_installed, no_mask
from .cache import BranchCache, PromptCache
from .cpu import packed_weights
from .delta import StepStates
from .pack import Tree, lay_out


class Sampler:
    """The decoding loop of one model for `generate(custom_generate=...)`: samples or takes the best token, as it does.

    Rows that have finished leave the batch. On a GPU they stay: a step is captured as a CUDA graph, once for all calls
    of the same shape, over buffers that last; the weights are updated in place.
    """

    def __init__(self) -> None:
        self._kept: _GraphedStep | None = None

    def __call__(
        self,
        model,
        input_ids: torch.Tensor,
        logits_processor,
        stopping_criteria,
        generation_config,
        *,
        trees: Sequence[Tree],
        sizes: list[int],
        images: dict[str, Any],
        all_ranks: bool = False,
        **_: Any,
    ) -> torch.Tensor:
        """(B, P + new): the prompts of all branches and their completions, padded behind the end token.

        Args:
            input_ids: the prompts of all branches, left-padded (B, P); only processors and criteria read them, which
                must treat each row by itself.
            trees: the same prompts, each once.
            sizes: how many completions each has; they stand side by side.
            images: what the model needs to see the images of all prompts (`pixel_values` ..., or encoded images).
            all_ranks: go on until all ranks have finished (`generate` does not hand its own such switch to a loop).
        """
        assert_installed(model)
        batch, width = input_ids.shape
        max_new = generation_config.max_length - width
        pad, sample = generation_config.pad_token_id, generation_config.do_sample
        sequences = torch.cat([input_ids, input_ids.new_full((batch, max_new), pad)], dim=1)
        logits, forward = self._start(model, trees, sizes, max_new, images, input_ids.device, all_ranks)

        # What is left of the batch: its rows, their tokens, and which of them go on.
        rows, live = torch.arange(batch, device=input_ids.device), sequences.clone()
        running = torch.ones_like(rows, dtype=torch.bool)
        step, finished = 0, False
        with packed_weights(model):
            while True:
                if not finished:
                    scores = logits_processor(live[:, : width + step], logits.to(copy=True, dtype=torch.float32))
                    chosen = draw(scores.softmax(dim=-1), rows) if sample else scores.argmax(dim=-1)
                    tokens = torch.where(running, chosen, pad)
                    live[:, width + step] = tokens
                    step += 1
                    running = running & ~stopping_criteria(live[:, : width + step], scores)
                    if step == max_new:
                        finished = True
                    elif step % forward.look_every == 0:
                        stay = running.nonzero()[:, 0]
                        finished = not len(stay)
                        if forward.rows_leave and 0 < len(stay) < len(rows):
                            sequences[rows] = live
                            rows, live, tokens, running = rows[stay], live[stay], tokens[stay], running[stay]
                            forward.keep(stay)
                            _keep_rows(logits_processor, stay)
                # Under ZeRO-3 a forward pass gathers weights from all ranks: none may stop before the last has finished.
                if not any_rank(not finished, input_ids.device) if all_ranks else finished:
                    sequences[rows] = live
                    return sequences[:, : width + step]
                logits = forward(tokens, min(step - 1, max_new - 1))

    def _start(
        self,
        model,
        trees: Sequence[Tree],
        sizes: list[int],
        max_new: int,
        images: dict[str, Any],
        device: torch.device,
        all_ranks: bool,
    ) -> tuple[torch.Tensor, _Step]:
        """One pass over the packed prompts: logits (B, V) after them, and the step that goes on."""
        inputs, layout, ends = lay_out(model.base_model, trees, device)
        recorded = PromptCache()
        logits = model(
            **inputs,
            past_key_values=recorded,
            use_cache=True,
            shared_prefix=layout,
            logits_to_keep=ends,
            return_dict=True,
            **images,
        ).logits[0]  # (N, V)
        layout.assert_used(model.config.get_text_config().num_hidden_layers)
        following = inputs["position_ids"][:, 0, ends].amax(0) + 1  # (N,)
        kind: type[_Step] = _GraphedStep if device.type == "cuda" and not all_ranks else _Step
        longest = max(len(tree.prefix) for tree in trees)
        if self._kept is not None and self._kept.fits(model, sizes, max_new, longest):
            step: _Step = self._kept
        else:
            self._kept = None  # its buffers go before the new ones come
            step = kind(model, sizes, max_new)
            self._kept = step if isinstance(step, _GraphedStep) else None
        step.cache.begin(recorded, layout.segments)
        repeats = torch.tensor(sizes, device=device)
        step.positions = following.repeat_interleave(repeats)
        return logits.repeat_interleave(repeats, dim=0), step


class _Step:
    """The forward pass of one token per branch.

    positions: (B,) position of each branch's first token.
    """

    rows_leave = True
    look_every = 1  # tokens between two looks at which rows have finished; a look waits for the device
    static = False
    positions: torch.Tensor

    def __init__(self, model, sizes: list[int], max_new: int) -> None:
        self.model, self.cache = model, BranchCache(sizes, max_new, static=self.static)

    def __call__(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """Logits (B, V) after `tokens` (B,), of which each branch has `length` before."""
        self.cache.advance(length)
        return self._run(tokens[:, None], (self.positions + length).expand(3, -1)[..., None])

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with the branches `rows` alone."""
        self.positions = self.positions[rows]
        self.cache.keep(rows.tolist())

    def _run(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.cache.layers_seen = 0
        logits = self.model(
            input_ids=tokens,  # (B, 1)
            position_ids=positions,  # (3, B, 1)
            attention_mask=no_mask(tokens.device),
            past_key_values=self.cache,
            use_cache=True,
            shared_prefix=self.cache,
            return_dict=True,
        ).logits[:, -1]
        self.cache.assert_used(self.model.config.get_text_config().num_hidden_layers)
        return logits


class _GraphedStep(_Step):
    """The same, captured as a CUDA graph: a step is then one launch instead of thousands."""

    rows_leave = False  # one graph, whose time goes into reading weights
    look_every = 8
    static = True

    def __init__(self, model, sizes: list[int], max_new: int) -> None:
        super().__init__(model, sizes, max_new)
        device, rows = model.device, sum(sizes)
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.at = torch.zeros(3, rows, 1, dtype=torch.long, device=device)
        self.graph: Any = None
        self.captures = True
        self._key = _addresses(model)
        # Autocast casts large float32 weights once a call; a graph that lasts would have to do it for each token.
        cast, total = _weights_to_cast(model)
        self._lasts = 10 * cast < total

    def fits(self, model, sizes: list[int], max_new: int, longest: int) -> bool:
        """Whether another call can use this step: the same shapes, and weights at the same addresses."""
        same = (self.cache.sizes, self.cache.max_new) == (list(sizes), max_new) and longest <= self.cache.room
        return same and self._lasts and self._key == _addresses(model)

    def __call__(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        self.cache.advance(length)
        self.tokens.copy_(tokens[:, None])
        self.at.copy_((self.positions + length).expand(3, -1)[..., None])
        if self.graph is None and self.captures:
            try:
                self._capture()
            except RuntimeError as e:  # some quantised layers wait for the device
                console.warn(f"the decoding step cannot be captured and runs as it is, slower: {first_line(e)}")
                self.captures = False
        return self._replay() if self.captures else self._run(self.tokens, self.at)

    def _capture(self) -> None:
        # Kernels choose their work space in runs before the capture. They write what the captured run writes; states
        # of linear attention, which a run moves on, are put back.
        before = {layer: StepStates(s.conv.clone(), s.recurrent.clone()) for layer, s in self.cache.states.items()}
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._run(self.tokens, self.at)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self._run(self.tokens, self.at)
            self.graph = graph
        finally:  # a capture that fails too: the step then runs as it is, from the same states
            for layer, states in before.items():
                self.cache.states[layer].copied(states)

    def _replay(self) -> torch.Tensor:
        self.graph.replay()
        return self.logits

    def _run(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        kind = tokens.device.type
        on = torch.is_autocast_enabled(kind)
        # Without its cache: a graph that lasts must cast for itself what autocast casts.
        with torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=on, cache_enabled=not self._lasts):
            return super()._run(tokens, positions)


def _keep_rows(logits_processor, rows: torch.Tensor) -> None:
    """Go on with `rows` in what a processor holds for each: a repetition penalty leaves out each row's own padding."""
    for processor in logits_processor:
        padding = getattr(processor, "prompt_ignore_length", None)
        if isinstance(padding, torch.Tensor):
            processor.prompt_ignore_length = padding.to(rows.device)[rows]


def _addresses(model) -> list[int]:
    return [p.data_ptr() for p in model.parameters()]


def _weights_to_cast(model) -> tuple[int, int]:
    """How many weights of the text part autocast would cast now, and how many there are."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    on = torch.is_autocast_enabled(model.device.type)
    return sum(p.numel() for p in weights if on and p.dtype == torch.float32), sum(p.numel() for p in weights)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any rank; every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    told = torch.tensor(float(flag), device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told.item())
