"""GRPO that does the work on a group's shared prompt once: a mixin over TRL's GRPOTrainer that changes no number.

    class Trainer(SharedPrefixMixin, GRPOTrainer): ...

- Generation: images preprocessed and encoded once, the prompt prefilled once, all branches decoded together.
- Reference and policy passes: one packed row per micro-batch, each prompt once and a branch per completion.

With `shared_prefix = False`, and for models it does not know, every method is TRL's own.
"""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import is_peft_model
from torch.utils.data import IterableDataset
from trl.trainer.utils import pad

from ..core import console
from ..core.errors import DataError
from .attention import assert_installed, install, not_shared
from .decode import Sampler, any_rank
from .pack import Group, Tree, cut, find_groups, pack, take_rows
from .prompts import (
    DistinctPrompts,
    PreparedProcessor,
    RowsByReference,
    encode_images,
    has_image,
    model_images,
    same_frozen_vision,
)

_Trainer: Any = object  # for type checkers: the attributes are GRPOTrainer's


class SharedPrefixMixin(_Trainer):
    """Put before `GRPOTrainer` in the bases.

    Attributes:
        shared_prefix: the switch; set it before `__init__`. False is plain TRL.
        shared_prefix_off: why nothing is shared, None when it is.
    """

    shared_prefix: bool = True
    shared_prefix_off: str | None = None
    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prompts: DistinctPrompts  # of the batch in work
        self._advantages: torch.Tensor | None = None  # of the micro-batch in work
        self._idle: list[torch.Tensor] = []  # log-probabilities and entropies of its skipped groups
        self._may_skip_idle = True
        self._encodes_once = False
        self._sampler = Sampler()
        policy = self._whole(self.model)
        self.shared_prefix_off = not_shared(policy) if self.shared_prefix else "switched off"
        if self.shared_prefix_off:
            if self.shared_prefix and self.accelerator.is_main_process:
                console.warn(f"shared_prefix: {self.shared_prefix_off}; groups are processed as plain TRL does it")
            return
        self.use_transformers_continuous_batching = False  # it would leave the images out
        reference = None if self.ref_model is None else self._whole(self.ref_model)
        install(policy)
        if reference is not None:
            install(reference)
        # Sharded weights are gathered in step on all ranks, but not all ranks have images at the same time.
        sharded = self._zero3 and (self.use_vllm or not self.args.ds3_gather_for_generation)
        once = same_frozen_vision(policy, reference) and not sharded
        self._encodes_once = not any_rank(not once, self.accelerator.device)

    def _whole(self, model):
        """The transformers model for conditional generation inside the wrappers of accelerate and PEFT."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if is_peft_model(model) else model

    # --- data: each distinct row is loaded once ------------------------------------------------------------------

    def get_train_dataloader(self):
        rows = self.train_dataset
        if self.shared_prefix_off or isinstance(rows, IterableDataset):
            return super().get_train_dataloader()
        with patch.object(self, "train_dataset", RowsByReference(rows)):
            return super().get_train_dataloader()

    # --- generation: each distinct prompt is processed, encoded and prefilled once --------------------------------

    def _generate_and_score_completions(self, inputs):
        if self.shared_prefix_off:
            return super()._generate_and_score_completions(inputs)
        # TRL processes all images a second time for the passes; the stand-in answers with what is already there.
        prepared = PreparedProcessor(self.processing_class, self._prepared_inputs)
        with patch.object(self, "processing_class", prepared):
            try:
                return super()._generate_and_score_completions(inputs)
            finally:
                self.__dict__.pop("_prompts", None)

    def _prepared_inputs(self) -> dict[str, torch.Tensor]:
        prompts = self._prompts
        self._encode()
        out = {k: v for k, v in prompts.fields.items() if k in ("pixel_values", "image_grid_thw")}
        if "mm_token_type_ids" in prompts.fields:
            types = prompts.repeat(prompts.fields["mm_token_type_ids"])
            out["mm_token_type_ids"] = pad([torch.tensor(x) for x in types], padding_side="left")
        return out

    def _encode(self) -> None:
        """Run a frozen vision tower once for generation and all passes; `pixel_values` then holds its output."""
        prompts = self._prompts
        if not self._encodes_once or prompts.encoded or "pixel_values" not in prompts.fields:
            return
        device = self.accelerator.device
        with torch.no_grad(), self.accelerator.autocast():
            pixels, grid = prompts.fields["pixel_values"].to(device), prompts.fields["image_grid_thw"].to(device)
            prompts.fields["pixel_values"] = encode_images(self._whole(self.model), pixels, grid)
        prompts.encoded = True

    def _tokenize_prompts(self, prompts: list):
        if self.shared_prefix_off:
            return super()._tokenize_prompts(prompts)
        if self._zero3 and not self._encodes_once and not all(map(has_image, prompts)):
            # Each rank must run the vision tower in every pass, because its weights are gathered from all ranks.
            raise DataError(
                "a prompt has no image, which ZeRO-3 cannot train on",
                hint="leave out rows without an image, as r1v does when it loads them",
            )
        starts = [i for i in range(len(prompts)) if i == 0 or prompts[i] != prompts[i - 1]]
        sizes = [b - a for a, b in zip(starts, [*starts[1:], len(prompts)], strict=True)]
        ids, images, fields = super()._tokenize_prompts([prompts[i] for i in starts])
        fields = {k: [list(map(int, x)) for x in v] if k.endswith("token_type_ids") else v for k, v in fields.items()}
        known = self._prompts = DistinctPrompts([list(x) for x in ids], images, fields, sizes)
        return known.repeat(known.ids), None if images is None else known.repeat(images), fields

    def _generate(self, prompts: list):
        out = super()._generate(prompts)
        if self.shared_prefix_off:
            return out
        *head, images, tool_images = out
        return *head, self._prompts.lead_images() if images is not None else None, tool_images

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
        if self.shared_prefix_off:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, **kwargs)
        prompts = self._prompts
        if self.use_vllm or not own_loop_can(self.generation_config):
            fields = prompts.repeated_fields()
            return super()._generate_single_turn(prompt_ids, images, fields, num_generations, **kwargs)
        whole, device = self._whole(self.model), self.accelerator.device
        generate = whole.generate

        def shared(generation_config, **inputs: Any) -> torch.Tensor:
            config = copy.copy(generation_config)
            config.cache_implementation = None  # the loop keeps its own cache
            with self.accelerator.autocast():  # around all steps: it casts float32 weights once and not once a token
                self._encode()
                fields = {k: v.to(device) for k, v in prompts.fields.items() if isinstance(v, torch.Tensor)}
                pixels, grid = fields.get("pixel_values"), fields.get("image_grid_thw")
                return generate(
                    generation_config=config,
                    custom_generate=self._sampler,
                    trees=[Tree(ids, own) for ids, own in zip(prompts.ids, prompts.grids(), strict=True)],
                    sizes=prompts.sizes,
                    images=model_images(whole, pixels, grid, encoded=prompts.encoded),
                    all_ranks=self._zero3 and not self.args.ds3_gather_for_generation,
                    **inputs,
                )

        with patch.object(whole, "generate", shared):  # inside TRL's preparations, and before it cuts completions
            return super()._generate_single_turn(prompt_ids, images, {}, num_generations, **kwargs)

    @property
    def _zero3(self) -> bool:
        plugin = self.accelerator.state.deepspeed_plugin
        return plugin is not None and plugin.zero_stage == 3

    # --- passes: groups stay together and are packed --------------------------------------------------------------

    def _prepare_inputs(self, generation_batch):
        if self.shared_prefix_off or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        parts = self.args.steps_per_generation
        if self._step % (parts * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            groups = self._groups(
                batch["prompt_ids"], batch["prompt_mask"], batch.get("num_images"), batch.get("image_grid_thw")
            )
            # TRL permutes samples here; groups are permuted instead, so that their samples meet in a micro-batch.
            order = torch.randperm(len(groups)).tolist()
            cuts = cut([groups[i] for i in order], len(batch["prompt_ids"]) // parts)
            self._buffered_inputs = [take_rows(batch, part) for part in cuts[:parts]]
        return self._buffered_inputs[self._step % parts]

    def _groups(self, prompt_ids, prompt_mask, num_images, image_grid_thw) -> list[Group]:
        merged = self._whole(self.model).config.vision_config.spatial_merge_size ** 2 if self._encodes_once else 1
        return find_groups(prompt_ids, prompt_mask, num_images, image_grid_thw, merged)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        if self.shared_prefix_off:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
            )
        pixels, grid, num_images = (kwargs.get(k) for k in ("pixel_values", "image_grid_thw", "num_images"))
        whole = self._whole(model)
        assert_installed(whole)
        width = input_ids.shape[1] - logits_to_keep
        # The layout is made on the host: it waits for the device here, and not again before the pass has begun.
        ids, mask, grids = input_ids.cpu(), attention_mask.cpu(), None if grid is None else grid.cpu()
        groups = self._groups(ids[:, :width], mask[:, :width], num_images, grids)
        live, idle = self._split_idle(groups) if torch.is_grad_enabled() else (groups, [])
        rows = [row for g in live + idle for row in range(g.start, g.stop)]
        order = torch.tensor(rows).argsort().to(input_ids.device)  # before the pass: a copy waits for its end

        def run(part: list[Group], model) -> list[torch.Tensor]:
            """Log-probabilities (rows, C) of the part and, if wanted, entropies."""
            packed = pack(whole.base_model, part, ids, mask, logits_to_keep, grids, input_ids.device)
            images = {}
            if pixels is not None and grid is not None:
                shown = torch.cat([pixels[g.pixels] for g in part])
                sizes = torch.cat([grid[g.grids] for g in part])
                images = model_images(whole, shown, sizes, encoded=self._encodes_once)
            with self.accelerator.autocast():
                outputs = model(**packed.inputs, **images, shared_prefix=packed.layout, fused_lm_head=True)
            packed.layout.assert_used(whole.config.get_text_config().num_hidden_layers)
            wanted = (outputs.log_probs, outputs.entropy) if compute_entropy else (outputs.log_probs,)
            return [packed.unpack(x, logits_to_keep) for x in wanted]

        passes = chunks(live, batch_size, self.num_generations) if batch_size else [live]
        parts = [run(part, model) for part in passes]
        if idle:
            with torch.no_grad():  # local, as other ranks may have no such group
                self._idle = run(idle, whole)
            parts.append([x.requires_grad_() for x in self._idle])  # see `_loses_gradient`
        logps, *entropies = (torch.cat(x)[order] for x in zip(*parts, strict=True))
        return logps, entropies[0] if entropies else None, None

    # TRL runs the policy on all rows, also on a group of equal rewards, whose advantages are zero and which adds
    # nothing to any gradient: its backward pass is half of its work. Can go when TRL leaves such groups out.
    def _compute_loss(self, model, inputs):
        self._advantages = inputs["advantages"] if self._skips_idle else None
        self._idle = []
        try:
            loss = super()._compute_loss(model, inputs)
            if self._advantages is not None and torch.is_grad_enabled() and self._loses_gradient(loss):
                console.warn("shared_prefix: a term of the loss moves groups of equal rewards too; none is skipped")
                self._may_skip_idle, self._advantages = False, None
                loss = super()._compute_loss(model, inputs)
            return loss
        finally:
            self._advantages = None

    @property
    def _skips_idle(self) -> bool:
        """Whether groups without a gradient may be left out of the backward pass.

        Not where a known term moves every group, and under ZeRO-3 all ranks must make the same forward passes.
        """
        moves_all = self.beta != 0.0 or self._entropy_bonus_enabled or self.aux_loss_enabled
        return self._may_skip_idle and not moves_all and not self._zero3

    def _loses_gradient(self, loss: torch.Tensor) -> bool:
        """Whether on any rank the loss, whatever its terms are, has a gradient by the outputs of a skipped group."""
        grads = torch.autograd.grad(loss, self._idle, retain_graph=True, allow_unused=True) if self._idle else ()
        return any_rank(any(g is not None and bool(g.any()) for g in grads), loss.device)

    def _split_idle(self, groups: list[Group]) -> tuple[list[Group], list[Group]]:
        """Groups that have a gradient, and those that have none because all their advantages are zero.

        One group is always kept, so that there is something to run backward through.
        """
        if self._advantages is None or not self._skips_idle:
            return groups, []
        moving = (self._advantages != 0).view(len(self._advantages), -1).any(dim=1).tolist()
        live = [g for g in groups if any(moving[g.start : g.stop])] or groups[:1]
        kept = {g.start for g in live}
        return live, [g for g in groups if g.start not in kept]


def chunks(groups: list[Group], rows: int, generations: int) -> list[list[Group]]:
    """Groups in parts of about `rows` rows: as many as complete groups of `generations` have, at least one."""
    return cut(groups, max(rows // generations, 1) * generations)


def own_loop_can(config) -> bool:
    """Whether `Sampler` does all that the generation config asks for."""
    return (
        str(getattr(config.get_generation_mode(), "value", "")) in ("greedy_search", "sample")
        and config.cache_implementation in (None, "dynamic", "static")
        and config.use_cache is not False
        and (config.num_return_sequences or 1) == 1
        and config.guidance_scale in (None, 1)
    )
