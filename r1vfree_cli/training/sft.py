"""Supervised warm start with TRL's SFTTrainer: loss on the assistant's tokens and its end of turn, on nothing else.

`python -m r1vfree_cli.training.sft RUN_DIR` is one rank of a run; the launcher starts it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from ..config.embedded import with_seed
from ..config.schema import SftRecipe
from ..core import console
from ..core.errors import DataError
from ..core.files import read_jsonl, write_json
from ..core.prompts import build_messages, target_text
from ..data.load import data_sha256, load_rows
from ..models.lengths import prompt_lengths
from ..models.load import load_policy, load_processor, peft_config, round_weights
from ..run import contract
from ..run.attempt import Attempt
from ..run.run_dir import FINISHED, INTERRUPTED, RunDir
from .callbacks import RunCallback
from .checkpoints import AtomicCheckpoints, resume_point, save_final, try_final_save
from .worker import is_main, on_main, refusals, worker

MAX_LENGTH = 4096  # tokens of a whole row, unless train.max_length says otherwise
IGNORED = -100  # the label that cross-entropy skips


class R1VSFTTrainer(AtomicCheckpoints, SFTTrainer):
    """TRL's trainer with atomic checkpoints and a loss that is the mean over the tokens of the whole batch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # Qwen-VL classes say False, about their own loss. TRL computes it here, and would then average the means of
        # ranks and micro-batches: rows with short answers would count for more, in a way that depends on the layout.
        self.model_accepts_loss_kwargs = True

    def _init_training_state(self, *args, **kwargs):
        found = super()._init_training_state(*args, **kwargs)
        # TRL counts tokens from 0 in every process; a resumed run goes on from the last count that was logged.
        counts = [h["num_tokens"] for h in self.state.log_history if "num_tokens" in h]
        self._total_train_tokens = int(counts[-1]) if counts else 0
        return found


# --- data ------------------------------------------------------------------------------------------------------


def control_tokens(processor) -> list[str]:
    """Tokens that would act as control tokens, image placeholders included, if a row's text held them."""
    return [str(t) for t in processor.tokenizer.all_special_tokens]


def target_ids(processor, rows: list[dict]) -> list[list[int]]:
    """Token ids of each row's assistant turn, the end-of-turn token included."""
    texts = [target_text(row.get("thinking"), row["solution"]) for row in rows]
    end = processor.tokenizer.eos_token_id
    return [[*ids, end] for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def select_rows(rows, processor, *, max_prompt_tokens: int | None, max_length: int | None):
    """Keep the rows that can be trained on whole.

    Args:
        rows: a `datasets.Dataset` of rows.
        max_prompt_tokens, max_length: limits of the prompt and of the whole row, in text and image tokens; None: any.

    Returns:
        (rows that stay, {reason: how many were dropped}).

    Raises:
        DataError: nothing is left; says why.
    """
    texts = rows.with_format(None).select_columns(["problem", "solution", "thinking"])
    control = control_tokens(processor)
    dropped: dict[str, int] = {}
    keep: list[int] = []
    targets: list[int] = []
    for start in range(0, len(texts), 512):
        batch = texts[start : start + 512]
        found = [dict(zip(batch, values)) for values in zip(*batch.values(), strict=True)]
        good = []
        for i, row in enumerate(found, start):
            reason = _problem(row, control)
            if reason:
                dropped[reason] = dropped.get(reason, 0) + 1
            else:
                good.append((i, row))
        keep += [i for i, _ in good]
        targets += [len(ids) for ids in target_ids(processor, [row for _, row in good])] if good else []
    if max_prompt_tokens is not None or max_length is not None:
        keep = _short_enough(rows, keep, targets, processor, max_prompt_tokens, max_length, dropped)
    if not keep:
        why = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "there are none"
        raise DataError(
            f"no row is left to train on: {why}",
            hint="SFT needs rows with a `solution`; data.max_prompt_tokens and train.max_length set the lengths",
        )
    return (rows if len(keep) == len(rows) else rows.select(keep)), dropped


def _problem(row: dict, control: list[str]) -> str | None:
    if not (row["solution"] or "").strip():
        return "no solution"
    text = "\n".join(part for part in row.values() if part)
    return "control tokens in the text" if any(token in text for token in control) else None


def _short_enough(rows, keep, targets, processor, max_prompt_tokens, max_length, dropped) -> list[int]:
    prompts = prompt_lengths(rows.select(keep) if len(keep) < len(rows) else rows, processor) if keep else []
    short = []
    for i, prompt, target in zip(keep, prompts, targets, strict=True):
        if max_prompt_tokens is not None and prompt > max_prompt_tokens:
            reason = f"prompt longer than {max_prompt_tokens} tokens"
        elif max_length is not None and prompt + target > max_length:
            reason = f"longer than {max_length} tokens"
        else:
            short.append(i)
            continue
        dropped[reason] = dropped.get(reason, 0) + 1
    return short


@dataclass
class Collator:
    """Rows to a batch for Qwen-VL: prompt and target side by side, padded on the right.

    Prompt and target are tokenized apart, as generation sees them. Labels are the target's ids, else -100.
    """

    processor: Any

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images = [image for row in rows for image in row["images"] or []]
        messages = [build_messages(row["problem"], len(row["images"] or [])) for row in rows]
        prompts = self.processor(
            text=self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            images=images or None,
            text_kwargs={"add_special_tokens": False},
            images_kwargs={"return_tensors": "pt"},
        )
        ids: list[list[int]] = prompts.pop("input_ids")
        prompts.pop("attention_mask")
        targets = target_ids(self.processor, rows)
        pad = self.processor.tokenizer.pad_token_id
        batch = {
            "input_ids": _padded([p + t for p, t in zip(ids, targets)], pad),  # [rows, longest row]
            "attention_mask": _padded([[1] * (len(p) + len(t)) for p, t in zip(ids, targets)], 0),
            "labels": _padded([[IGNORED] * len(p) + t for p, t in zip(ids, targets)], IGNORED),
        }
        types = prompts.pop("mm_token_type_ids", None)
        if types is not None:  # 1 on image tokens: Qwen-VL's positions are made from it
            batch["mm_token_type_ids"] = _padded([list(p) + [0] * len(t) for p, t in zip(types, targets)], 0)
        return batch | dict(prompts)  # pixel_values: [patches, patch size], image_grid_thw: [images, 3]


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


# --- the run ---------------------------------------------------------------------------------------------------


def sft_config(recipe: SftRecipe, run: RunDir) -> SFTConfig:
    """TRL's config: the recipe's `train` by name, and what r1v decides. Build it before the model (ZeRO-3).

    Raises:
        UsageError: TRL or transformers refuses a combination.
    """
    given = dict(recipe.train.model_extra or {})
    # Lengths are ours: rows are dropped and counted. TRL would cut through image tokens.
    given.pop("max_length", None)
    defaults = {"dataloader_num_workers": 1 if recipe.launch.on_cpu else 4, "disable_tqdm": True}
    with refusals(recipe):
        return SFTConfig(
            **(defaults | given),
            max_length=None,
            output_dir=str(run.checkpoints),
            bf16=recipe.model.dtype == "bfloat16",
            fp16=recipe.model.dtype == "float16",
            use_cpu=recipe.launch.on_cpu,
            remove_unused_columns=False,  # the collator reads the rows
            trust_remote_code=recipe.model.trust_remote_code,
        )


def main(recipe: SftRecipe, attempt: Attempt) -> None:
    """Train, and leave `final/`, `summary.json` and the status. Runs on every rank."""
    started = time.perf_counter()
    run = attempt.run
    args = sft_config(recipe, run)
    resume = on_main(lambda: resume_point(attempt))  # other nodes have no run dir to see that it is a resume
    processor = load_processor(recipe.model, args.seed)
    path = with_seed(recipe.data.path, args.seed)
    rows, dropped = select_rows(
        load_rows(path, recipe.data.split, recipe.data.limit),
        processor,
        max_prompt_tokens=recipe.data.max_prompt_tokens,
        max_length=(recipe.train.model_extra or {}).get("max_length", MAX_LENGTH),
    )
    for reason, count in dropped.items():
        console.log(f"dropped {count} rows: {reason}")
    callback = RunCallback(run)
    policy = load_policy(recipe.model, args.seed, weights=recipe.weights_dtype)
    with refusals(recipe):
        trainer = R1VSFTTrainer(
            model=policy,
            args=args,
            data_collator=Collator(processor),
            train_dataset=rows,
            processing_class=processor,
            peft_config=peft_config(recipe.model),
            callbacks=[callback],
        )
    trainer.contract = contract.build(
        "sft", recipe, data_sha256=data_sha256(path, recipe.data.split), git_commit=attempt.git_commit
    )
    try_final_save(trainer)
    if resume and is_main():
        contract.warn_of_changes(resume, trainer.contract)
    prepared = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trained = time.perf_counter()
    if callback.stopped is not None:
        if is_main():
            run.set_status(INTERRUPTED, reason="interrupted", step=trainer.state.global_step)
        raise callback.stopped
    if recipe.weights_dtype != recipe.model.dtype:
        round_weights(trainer.model, recipe.model.dtype)
    save_final(trainer, run.final)
    if is_main():
        times = {"prepare": prepared - started, "train": trained - prepared, "save": time.perf_counter() - trained}
        write_json(run.summary, summary(run, trainer, len(rows), dropped, attempt.seconds_until_now("sft") | times))
        run.set_status(FINISHED, step=trainer.state.global_step, reason=None)


def summary(run: RunDir, trainer, rows: int, dropped: dict[str, int], times: dict[str, float]) -> dict:
    """What the final table prints. Times in seconds, of this attempt."""
    lines = [line for _, line in read_jsonl(run.metrics)] if run.metrics.is_file() else []
    ends = {key: [line[key] for line in lines if line.get(key) is not None] for key in ("loss", "mean_token_accuracy")}
    return {
        "stage": "sft",
        "steps": trainer.state.global_step,
        "rows": rows,
        "dropped": dropped,
        "seconds": {name: round(seconds, 2) for name, seconds in times.items()},
        **{key: {"first": values[0], "last": values[-1]} for key, values in ends.items() if values},
    }


if __name__ == "__main__":
    worker("sft", main)
