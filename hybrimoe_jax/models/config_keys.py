"""The keys of a `config.json` that no field reads: those that must have a neutral value, and those that are harmless.

Both are by what Hugging Face transformers computes. A test walks its configuration class of every family, and what its
code reads besides: each key is a field, in `NEUTRAL`, or in `HARMLESS`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "per_layer_config": (None, {}),
    "transformers_weights": (None,),
    "is_encoder_decoder": (False, None),
    "text_config": (None, {}),
    "decoder": (None, {}),
    "generator": (None, {}),
    "pruned_heads": (None, {}),
    "attention_bias": (False, None),
    "qkv_bias": (False, None),
    "mlp_bias": (False, None),
    "use_qk_norm": (False, None),
    "clip_qkv": (None,),
    "sliding_window": (None, 0),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None, []),
    "partial_rotary_factor": (1, None),
    "rotary_pct": (1, None),
    "rope_interleave": (False, None),
    "alibi": (False, None),
    "no_rope_layers": (None, []),
    "scoring_func": ("softmax", None),
    "topk_method": ("greedy", None),
    "n_group": (0, 1, None),
    "topk_group": (0, 1, None),
    "routed_scaling_factor": (1, None),
    "router_logit_softcapping": (0, None),
    "n_shared_experts": (0, None),
    "shared_expert_intermediate_size": (0, None),
    "first_k_dense_replace": (0, None),
    "moe_layer_freq": (1, None),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1, None),
    "interleave_moe_layer_step": (1, None),
    "num_nextn_predict_layers": (0, None),
    "hidden_activation": ("silu", "swish", None),
    "swiglu_limit": (None, 0),
    "query_pre_attn_scalar": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (1, None),
    "logits_scaling": (1, None),
    "embedding_multiplier": (1, None),
    "scale_emb": (1, None),
    "residual_multiplier": (1, None),
    "attention_multiplier": (None,),
    "use_parallel_residual": (False, None),
    "quantization_config": (None, {}),
    "compression_config": (None, {}),
    "quantization": (None, {}),
}
"""Key -> the values under which it changes nothing; any other is refused where the family has no such field."""

HARMLESS: dict[str, tuple[str, ...]] = {
    "says which code and files the model came with; `model_type` says which this is": (
        *("architectures", "auto_map", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash"),
        *("torch_dtype", "dtype", "base_model_pp_plan", "base_model_tp_plan", "base_model_ep_plan"),
        *("distributed_config", "fusion_config", "ep_size", "device_map"),
    ),
    "training only": (
        *("attention_dropout", "hidden_dropout", "router_jitter_noise", "router_aux_loss_coef", "aux_loss_alpha"),
        *("seq_aux", "initializer_range", "initializer_factor", "init_std", "pretraining_tp"),
        *("gradient_checkpointing", "classifier_dropout"),
    ),
    "says what a call returns, not what is computed": (
        *("output_router_logits", "output_hidden_states", "output_attentions", "return_dict", "use_return_dict"),
        *("tie_last_hidden_states", "torchscript", "use_cache", "is_decoder"),
    ),
    "a way to compute the same numbers": (
        *("chunk_size_feed_forward", "attn_implementation", "_attn_implementation", "experts_implementation"),
        *("_experts_implementation", "use_bfloat16", "disable_mmap"),
    ),
    "of heads that are no language model": (
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "token_classification_bias"),
    ),
    "of layers that no family here has": ("number_of_conv_states",),
    "a token's id, which the tokenizer has": ("bos_token_id", "pad_token_id", "sep_token_id", "unk_token_id"),
    "derived from other keys, which are read": ("qk_head_dim", "use_sliding_window", "head_dim", "max_window_layers"),
}
"""Why it changes nothing -> the keys. A family that has such a field reads it all the same."""

ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "layer_types")
"""Read by no field of their own, but read."""

GENERATION = (
    *("assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens"),
    *("decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size"),
    *("encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty"),
    *("forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length"),
    *("no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups", "num_beams"),
    *("num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty"),
    *("return_dict_in_generate", "suppress_tokens", "target_lookbehind", "temperature", "top_k", "top_p", "typical_p"),
)
"""Of old files: transformers drops them here, too; `generation_config.json` is where they count."""


def unknown_keys(raw: Mapping[str, Any], fields: Collection[str]) -> list[str]:
    """The keys of a `config.json` that neither `fields` nor anything here knows."""
    known = {*fields, *NEUTRAL, *ROPE, *GENERATION, *(key for keys in HARMLESS.values() for key in keys)}
    return [key for key in raw if key not in known]
