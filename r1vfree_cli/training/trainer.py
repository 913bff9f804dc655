"""The one subclass of TRL's GRPOTrainer: required rewards, stops that all ranks take together, rollouts, figures."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from trl import GRPOTrainer

from ..config.schema import Guard
from ..core.errors import GuardStop, R1VError, from_dict
from ..models.sampling import (
    LogitsWatch,
    keyed_draws,
    merge_generation_kwargs,
    never_sampled,
    pin_generation,
    watch_logits,
)
from ..rewards.text import completion_text
from ..run.checkpoint import lacking
from ..shared_prefix.decode import any_rank
from ..shared_prefix.mixin import SharedPrefixMixin
from . import vllm_sampler
from .checkpoints import AtomicCheckpoints
from .guard import offenders
from .recorder import Recorder, Rollout
from .resume import ExactResumeMixin


class R1VGRPOTrainer(AtomicCheckpoints, ExactResumeMixin, SharedPrefixMixin, GRPOTrainer):
    """GRPO as TRL does it, but:

    - a sample whose required reward is None is out of its group: no part in mean and spread, advantage exactly 0;
    - an exception in a reward, too many failed scores or a loss that is not finite stops all ranks in the same step,
      before the weights change;
    - sampling is the recipe's alone (`pin_generation`), visual tokens are never sampled, and transformers' sampling
      is keyed by seed, step and row (`keyed_draws`);
    - every rollout of all ranks goes to `recorder`;
    - a resume is exact (`AtomicCheckpoints`, `ExactResumeMixin`).

    `reward_funcs` may have what `rewards.registry.build_rewards` tells. `guard` None turns the checks for NaN off;
    `kwargs` are GRPOTrainer's own, of which `model` is a loaded model and `processing_class` a processor.
    """

    def __init__(
        self, *, reward_funcs: Sequence[Any], guard: Guard | None = None, shared_prefix: bool = False, **kwargs
    ):
        args, model, processor = kwargs["args"], kwargs["model"], kwargs["processing_class"]
        self.guard, self.shared_prefix = guard, shared_prefix
        self.required = [bool(getattr(r, "required", False)) for r in reward_funcs]
        self._watched: list[Any] = [Watched(r) for r in reward_funcs]
        self.carried = {f"reward/{w.__name__}": w.reward for w in self._watched if hasattr(w.reward, "state_dict")}
        self.recorder = Recorder()
        self.carried["rollouts"] = self.recorder
        self.stopping = False  # set on all ranks by an error that all of them raise in the same place
        # Without its table of completions TRL would still gather its images in every step, and ranks that have some
        # would wait for ever for one that has text alone.
        args.log_multimodal = args.log_multimodal and args.log_completions
        pin_generation(model, processor.tokenizer)
        tokens = never_sampled(model.config, processor.tokenizer, use_vllm=args.use_vllm)
        if args.use_vllm:  # it knows the end tokens of the checkpoint's files only
            tokens["stop_token_ids"] = list(model.generation_config.eos_token_id)
        args.generation_kwargs = merge_generation_kwargs(args.generation_kwargs, tokens)
        revision = (args.model_init_kwargs or {}).get("revision")
        with vllm_sampler.installed(args, processor, revision) if args.use_vllm else nullcontext():
            super().__init__(reward_funcs=self._watched, **kwargs)

    # --- sampling ----------------------------------------------------------------------------------------------

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self.use_vllm:
            if any_rank(not self.vllm_generation.answers(), self.accelerator.device):
                self._stop(f"the vLLM server does not answer before {self._now}", hint=vllm_sampler.AGAIN)
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        micro = self._step % self.args.gradient_accumulation_steps
        first = self.accelerator.process_index * len(prompt_ids)
        key, rows = (self.args.seed, 0, self.state.global_step, micro), range(first, first + len(prompt_ids))
        draws = keyed_draws(key, rows, self.max_completion_length)
        with draws, watch_logits(self.accelerator.unwrap_model(self.model)) as logits:
            out = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self.stop_unless_finite(logits)
        return out

    def stop_unless_finite(self, logits: LogitsWatch) -> None:
        """Raise GuardStop on every rank when the model computed NaN on any."""
        if any_rank(not logits.usable, self.accelerator.device):
            self._stop(
                f"the model computes NaN: its logits are not finite, or all alike, before {self._now}",
                hint="a lower train.learning_rate, or a checkpoint whose weights are whole",
            )

    # --- rewards and rollouts ----------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # [N, R], all ranks
        self._raise_together()
        training = self.model.training
        generations = self.num_generations if training else self.num_generations_eval or 1
        masked = comparable(rewards, self.required, generations)
        if training:
            self._raw = rewards  # before what may not be compared became NaN
            batch = self._gather_rollouts(inputs, completions, completion_ids_list, rewards, masked)
            self.recorder.add(batch, self.num_generations)
            self._stop_when_judge_fails(rewards)
        return masked

    def _generate_and_score_completions(self, inputs):
        training = self.model.training
        output = super()._generate_and_score_completions(inputs)
        if training:
            advantages = list(self._logs["advantages"])[-len(self.recorder.batch) :]
            for rollout, advantage in zip(self.recorder.batch, advantages, strict=True):
                rollout.advantage = advantage
            self._report_raw_rewards()
            if "sampling_per_token_logps" in output and "old_per_token_logps" in output:
                self._report_sampler(output)
        return output

    def _gather_rollouts(self, inputs, completions, completion_ids_list, rewards, masked) -> list[Rollout]:
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        local = [
            Rollout(
                step=self.state.global_step + 1,
                group=0,
                id=str(row.get("id", "")),
                prompt=str(row.get("problem") or ""),
                completion=completion_text(completion),
                tokens=len(ids),
                clipped=not ids or ids[-1] not in ends,
            )
            for row, completion, ids in zip(inputs, completions, completion_ids_list, strict=True)
        ]
        gathered = gather_object(local)
        weights = self.reward_weights.tolist()
        for rollout, raw, kept in zip(gathered, rewards.tolist(), masked.tolist(), strict=True):
            scores = [None if math.isnan(v) else v for v in raw]
            rollout.rewards = dict(zip(self.reward_func_names, scores, strict=True))
            counted = [w * v for w, v in zip(weights, kept, strict=True) if not math.isnan(v)]
            rollout.reward = sum(counted) if counted else None
        return gathered

    def _report_raw_rewards(self) -> None:
        """A reward's mean and spread over every sample it scored, those that another reward threw out included."""
        metrics = self._metrics["train"]
        for name, scores in zip(self.reward_func_names, self._raw.T, strict=True):
            scored = scores[~torch.isnan(scores)]
            metrics[f"rewards/{name}/mean"][-1] = scored.mean().item() if len(scored) else math.nan
            metrics[f"rewards/{name}/std"][-1] = scored.std().item() if len(scored) > 1 else math.nan
            metrics[f"rewards/{name}/unscored"].append(1 - len(scored) / len(self._raw))

    def _report_sampler(self, output) -> None:
        """Importance ratios of completions, trainer over vLLM, before TRL clips or masks them, of all ranks."""
        difference = torch.nan_to_num(output["old_per_token_logps"] - output["sampling_per_token_logps"])  # (B, C)
        ratios = vllm_sampler.importance(self.accelerator.gather((difference * output["completion_mask"]).sum(-1)))
        for name, value in ratios.items():
            self._metrics["train"][f"sampling/{name}"].append(value)

    # --- stops -------------------------------------------------------------------------------------------------

    def _stop(self, message: str, **more: Any) -> NoReturn:
        """Raise GuardStop, which all ranks do in the same place."""
        self.stopping = True
        raise GuardStop(message, **more)

    @property
    def _now(self) -> str:
        return f"step {self.state.global_step + 1}"

    def _raise_together(self) -> None:
        """Raise on every rank when a reward raised on any."""
        own = next((w.error for w in self._watched if w.error is not None), None)
        first = next((d for d in gather_object([own.to_dict() if own else None]) if d), None)
        if first is not None:
            self.stopping = True
            raise own or from_dict(first)

    def _stop_when_judge_fails(self, rewards: torch.Tensor) -> None:
        for i, (reward, name) in enumerate(zip(self._watched, self.reward_func_names, strict=True)):
            allowed = getattr(reward.reward, "max_failed_fraction", None)
            if not self.required[i] or allowed is None:
                continue
            failed = int(torch.isnan(rewards[:, i]).sum())
            if failed > allowed * len(rewards):
                causes = [str(f) for f in list(getattr(reward.reward, "failures", None) or ())[-3:]]
                self._stop(
                    f"reward {name} failed for {failed} of {len(rewards)} rollouts in {self._now} "
                    f"({failed / len(rewards):.0%}, allowed {allowed:.0%})",
                    details=gather_object(causes)[:4] + offenders(self.recorder.batch, "unscored"),
                    hint="bring the judge back and continue with --resume; "
                    f"rewards.{name}.max_failed_fraction is the limit",
                )

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.guard is not None and any_rank(not bool(torch.isfinite(loss)), loss.device):
            self._stop(
                f"the loss is not finite in {self._now}; the weights were not changed by it",
                details=offenders(self.recorder.batch, None),
                hint="a lower train.learning_rate or train.max_grad_norm, or model.dtype: bfloat16 instead of float16",
            )
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # DeepSpeed has taken the step by now (the callback then stops without a checkpoint); with fp16 the scaler
        # skips such steps by itself.
        early = self.accelerator.distributed_type != DistributedType.DEEPSPEED and not self.args.fp16
        if self.guard is not None and early and not math.isfinite(float(norm)):
            self._stop(
                f"the gradient is not finite in {self._now}; the weights were not changed by it",
                details=offenders(self.recorder.batch, None),
                hint="a lower train.learning_rate",
            )
        return norm

    def save_now(self) -> None:
        """Write a checkpoint of the last completed step unless there is one; all ranks must call it."""
        self.recorder.forget_after(self.state.global_step)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        done = not lacking(folder, verify=False)
        if not any_rank(done, self.accelerator.device):
            self._save_checkpoint(self.model, trial=None)

    # --- figures -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.model.training:
            logs.update(self._reward_stats())
        super().log(logs, start_time)

    def _reward_stats(self) -> dict[str, float]:
        """`stats()` of all rewards on all ranks: counts are added up, of latencies the worst rank's is taken."""
        local = [w.reward.stats() for w in self._watched if hasattr(w.reward, "stats")]
        total: dict[str, float] = {}
        for key, value in (item for stats in gather_object(local) for item in stats.items()):
            if value is not None:
                total[key] = max(total.get(key, value), value) if "latency" in key else total.get(key, 0) + value
        return total


def comparable(rewards: torch.Tensor, required: Sequence[bool], num_generations: int) -> torch.Tensor:
    """`rewards` [N, R] with NaN where a score must not count within its group, same shape.

    TRL gives rows that are NaN throughout no part in means and spreads and advantage 0, and counts a single NaN as 0.
    So that "not scored" never acts as a 0:
    - a row that misses a required reward becomes NaN throughout;
    - an optional reward that misses some remaining rows of a group counts for none of that group;
    - a group with fewer than two rows left becomes NaN throughout.
    """
    wanted = torch.tensor(list(required), dtype=torch.bool, device=rewards.device)
    out = rewards.masked_fill((torch.isnan(rewards) & wanted).any(1, keepdim=True), torch.nan)
    grouped = out.view(-1, num_generations, rewards.shape[1])  # [groups, G, R]
    missing = torch.isnan(grouped)
    partly = (missing & ~missing.all(-1, keepdim=True)).any(1, keepdim=True)  # [groups, 1, R]
    grouped = grouped.masked_fill(partly, torch.nan)
    left = (~torch.isnan(grouped)).any(-1).sum(1)  # [groups]
    return grouped.masked_fill((left < 2)[:, None, None], torch.nan).view_as(rewards)


class Watched:
    """A reward whose exception is kept, so that no rank leaves while the others wait for it in a collective.

    Asynchronous, whatever the reward is: TRL would run synchronous ones to their end before the judge is asked.
    """

    def __init__(self, reward):
        self.reward = reward
        self.__name__ = getattr(reward, "__name__", type(reward).__name__)
        self.error: R1VError | None = None

    async def __call__(self, completions, **kwargs) -> list:
        try:
            scores = await asyncio.to_thread(self.reward, completions=completions, **kwargs)
            return await scores if inspect.isawaitable(scores) else scores
        except R1VError as e:
            self.error = e
        except Exception as e:
            rank = PartialState().process_index
            self.error = R1VError(f"reward {self.__name__} raised on rank {rank}: {e!r}")
            self.error.__cause__ = e
        return [None] * len(completions)
