"""Every method of TRL, transformers, accelerate and DeepSpeed that r1v overrides, and every private of theirs it uses.

An upgrade is read along this list: a test compares it with what is installed, and finds what is not in it. Strings
only: nothing is imported here.
"""

from __future__ import annotations

from typing import NamedTuple


class Hook(NamedTuple):
    """One place where r1v depends on more than a public interface.

    name: as `pkgutil.resolve_name` takes it; of an attribute of instances, the class whose source assigns it.
    parameters: of a function, in order, `...` for any more; None for an attribute.
    why: what the library does, and why that is wrong or slow here.
    until: what makes it unnecessary.
    """

    name: str
    parameters: str | None
    why: str
    until: str


_GRPO = "trl.trainer.grpo_trainer:GRPOTrainer."
_SFT = "trl.trainer.sft_trainer:SFTTrainer."
_TRAINER = "transformers.trainer:Trainer."
_ATOMIC = "Trainer can write a checkpoint beside its place and rename it"
_EXACT = "Trainer's checkpoint holds what TRL keeps between steps"
_SHARED = "TRL packs the completions of a group behind one prompt"
_VLLM = "trl.generation.vllm_generation:VLLMGeneration."
_ONE_PROMPT = "TRL hands vLLM prompt and image once"
_READS = "damaged files raise anything; a user reads which checkpoint it is"

OVERRIDES = (
    # training/trainer.py
    Hook(
        _GRPO + "_generate_single_turn",
        "self prompt_ids images multimodal_fields num_generations has_tool_images",
        "samples from the global generator: other numbers of ranks or a resume draw other completions; processes and "
        "prefills each prompt G times",
        _SHARED + ", and generation takes a generator per row",
    ),
    Hook(
        _GRPO + "_calculate_rewards",
        "self inputs prompts completions completion_ids_list",
        "counts an unscored reward as 0, and an exception on one rank leaves the others in a collective",
        "TRL excludes unscored samples and raises on all ranks",
    ),
    Hook(
        _GRPO + "_generate_and_score_completions",
        "self inputs",
        "keeps no advantage per rollout; processes each image G times for the passes",
        _SHARED + " and hands rollouts to callbacks",
    ),
    Hook(
        _GRPO + "_compute_loss",
        "self model inputs",
        "trains on a loss that is not finite; gives the passes no advantages to leave zero-advantage groups out by",
        "TRL checks the loss before backward",
    ),
    Hook(
        _TRAINER + "_get_grad_norm", "self model grad_norm", "takes a step with NaN gradients", "Trainer stops on NaN"
    ),
    Hook(_GRPO + "log", "self logs start_time", "knows no figures of a reward but mean and std", "rewards can log"),
    # shared_prefix/mixin.py
    Hook(_GRPO + "get_train_dataloader", "self", "loads and decodes each row G times", _SHARED),
    Hook(_GRPO + "_tokenize_prompts", "self prompts", "processes each image G times", _SHARED),
    Hook(_GRPO + "_generate", "self prompts", "returns G copies of each image", _SHARED),
    Hook(_GRPO + "_prepare_inputs", "self generation_batch", "permutes samples, which parts groups", _SHARED),
    Hook(
        _GRPO + "_get_per_token_logps_and_entropies",
        "self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss ...",
        "runs prompt and image G times",
        _SHARED,
    ),
    # training/vllm_sampler.py
    Hook(_VLLM + "_init_vllm", "self", "leaves number format, pixel limits and revision to vLLM", _ONE_PROMPT),
    Hook(_VLLM + "sync_weights", "self", "keeps what the old vision tower made of images", "it resets that cache"),
    Hook(
        _VLLM + "generate",
        "self prompts images num_generations profiler",
        "colocate mode hands over expanded image tokens, which vLLM expands again",
        _ONE_PROMPT,
    ),
    Hook(
        _VLLM + "_place_features",
        "self features prompt_ids",
        "takes images that touch for one, and does not compare how many tokens they have",
        _ONE_PROMPT,
    ),
    # training/resume.py
    Hook(_GRPO + "_get_train_sampler", "self dataset", "a resume in epoch 2 walks through epoch 1 again", _EXACT),
    Hook(_GRPO + "training_step", "self model inputs num_items_in_batch", "forgets where a step began", _EXACT),
    Hook(_TRAINER + "_save_rng_state", "self output_dir", "the one place where every rank writes its own file", _EXACT),
    Hook(_TRAINER + "_load_rng_state", "self checkpoint", "the one place where every rank reads its own file", _EXACT),
    Hook(
        "trl.trainer.utils:RepeatSampler.__init__",
        "self data_source mini_repeat_count batch_size repeat_count shuffle seed",
        "its order depends on what was drawn before",
        _EXACT,
    ),
    # training/sft.py
    Hook(
        _TRAINER + "_init_training_state",
        "self max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
        "a resumed run counts its tokens from 0",
        _EXACT,
    ),
    # training/checkpoints.py
    Hook(_TRAINER + "_get_output_dir", "self trial", "a killed save leaves half a checkpoint in its place", _ATOMIC),
    Hook(_TRAINER + "_push_from_checkpoint", "self checkpoint_folder", "pushes before the rename", _ATOMIC),
    Hook(_GRPO + "_save_checkpoint", "self model trial", "writes in place, without contract or hashes", _ATOMIC),
    Hook(_SFT + "_save_checkpoint", "self model trial", "as for GRPO", _ATOMIC),
    Hook(
        _TRAINER + "_save", "self output_dir state_dict", "ZeRO-3 reverts renamings that were not made", "it does not"
    ),
    Hook(
        _TRAINER + "_prepare_for_training",
        "self max_steps train_dataloader resume_from_checkpoint",
        "lets DeepSpeed unpickle a checkpoint's objects",
        "DeepSpeed reads with weights_only",
    ),
    Hook(
        _TRAINER + "_run_epoch",
        "self model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
        "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
        "tells the epoch to no sampler behind the wrapper that skips batches",
        "accelerate's SkipBatchSampler passes set_epoch on",
    ),
    Hook(_GRPO + "_load_optimizer_and_scheduler", "self checkpoint", _READS, "errors name the file"),
    Hook(_TRAINER + "_load_scaler", "self checkpoint", _READS, "errors name the file"),
    Hook(
        _TRAINER + "_load_from_checkpoint",
        "self resume_from_checkpoint model",
        "reads published names of weights as the module's and only warns that none fits",
        "Trainer loads by from_pretrained",
    ),
)

PRIVATES = (
    Hook(_GRPO + "_step", None, "the micro-step, which keys the draws and is part of a position", _EXACT),
    Hook(_GRPO + "_buffered_inputs", None, "the generated batch that several steps share", _EXACT),
    Hook(_GRPO + "_metrics", None, "figures since the last logged step; a reward's mean over all it scored", _EXACT),
    Hook(_GRPO + "_logs", None, "the only place that keeps advantages", "TRL hands rollouts to callbacks"),
    Hook(_GRPO + "_tokenizer", None, "the tokenizer that generation pads with", "it is public"),
    Hook(_GRPO + "_entropy_bonus_enabled", None, "with a bonus, zero-advantage groups have a gradient", _SHARED),
    Hook(_TRAINER + "_tr_loss", None, "the loss since the last logged step", _EXACT),
    Hook(_TRAINER + "_globalstep_last_logged", None, "when that was", _EXACT),
    Hook(_SFT + "_total_train_tokens", None, "tokens so far", _EXACT),
    Hook(_TRAINER + "model_accepts_loss_kwargs", None, "TRL averages means of ranks where it is False", "TRL sets it"),
    Hook("trl.trainer.utils:is_async_callable", "func", "how TRL tells asynchronous rewards", "never: one line"),
    Hook("trl.data_utils:prepare_multimodal_messages", "messages ...", "held-out prompts as TRL makes them", "never"),
    Hook("trl.trainer.utils:pad", "tensors padding_value padding_side ...", "rows are padded as TRL's", "never"),
    Hook(_GRPO + "use_transformers_continuous_batching", None, "generates without the images", _SHARED),
    Hook(
        "transformers.training_args:is_torch_bf16_gpu_available",
        "",
        "the CPU computes in bfloat16 only where it is told use_cpu, which leaves DeepSpeed out",
        "TrainingArguments asks accelerate",
    ),
    Hook(
        "transformers:PreTrainedConfig._attn_implementation", None, "flash attention finds its kernels by it", "never"
    ),
    Hook("torch:ops.mkldnn._reorder_linear_weight", None, "a weight in oneDNN's layout", "F.linear keeps one"),
    Hook("torch:ops.mkldnn._linear_pointwise", None, "the product with it", "F.linear keeps one"),
    Hook(
        "transformers.utils.generic:is_flash_attention_requested",
        "config ...",
        "vision towers hand all images to an implementation with flash in its name, and split them by hand for others",
        "they ask the implementation whether it takes lengths",
    ),
    Hook(
        "transformers.models.qwen2_vl:Qwen2VLProcessor._get_num_multimodal_tokens",
        "self image_sizes ...",
        "image tokens of a size without its pixels; vLLM uses it too",
        "it is public",
    ),
    Hook(
        "trl.generation.vllm_client:parse_logprobs",
        "choices_logprobs",
        "reads `token_id:N`; vLLM 0.32 writes the number",
        "TRL supports vLLM 0.32",
    ),
    Hook(
        "transformers.integrations.deepspeed:_hf_deepspeed_config_weak_ref",
        None,
        "a local judge would be sharded like the policy",
        "from_pretrained takes a switch",
    ),
    Hook(
        "transformers.integrations:WandbCallback._wandb",
        None,
        "its run is closed after the model is saved",
        "it ends runs",
    ),
    Hook("transformers.integrations:TrackioCallback._trackio", None, "its run gets the recipe", "it takes a config"),
    Hook("deepspeed.ops:__compatible_ops__", None, "its CPU collectives take a compiler", "DeepSpeed falls back"),
    Hook("deepspeed.runtime.fp16.loss_scaler:LossScaler", "self scale", "in ZeRO files: allowed to be read", "never"),
    Hook("deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler", "self ...", "as LossScaler", "never"),
    Hook("deepspeed.runtime.zero.config:ZeroStageEnum", None, "as LossScaler", "never"),
    Hook("deepspeed.utils.tensor_fragment:fragment_address", None, "as LossScaler", "never"),
    Hook(
        "deepspeed.utils.zero_to_fp32:get_fp32_state_dict_from_zero_checkpoint",
        "checkpoint_dir ...",
        "merges the shards of a checkpoint; a script's function",
        "never",
    ),
)
