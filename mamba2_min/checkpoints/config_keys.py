"""The keys of other programs' config.json: those that become a `Mamba2Config`, those that must have one value, and
those that do not change the function that the weights compute. A key that is in none of these tables is refused by
name.

    HF         transformers' Mamba2Config, and flash-linear-attention's, which has the same model_type
    OFFICIAL   state-spaces' MambaConfig: TOP, and SSM for what is in its ssm_cfg
"""

from __future__ import annotations

from typing import Any

# ours: (theirs, its default in transformers, its default in flash-linear-attention)
HF: dict[str, tuple[str, Any, Any]] = {
    "vocab_size": ("vocab_size", 32768, 32000),
    "d_model": ("hidden_size", 4096, 2048),
    "n_layer": ("num_hidden_layers", 64, 48),
    "d_state": ("state_size", 128, 128),
    "d_conv": ("conv_kernel", 4, 4),
    "expand": ("expand", 2, 2),
    "headdim": ("head_dim", 64, 64),
    "ngroups": ("n_groups", 8, 1),
    "chunk_size": ("chunk_size", 256, 256),
    "tie_embeddings": ("tie_word_embeddings", False, False),
    "norm_eps": ("layer_norm_epsilon", 1e-5, 1e-5),
    "conv_bias": ("use_conv_bias", True, True),
    "proj_bias": ("use_bias", False, False),
    "residual_in_fp32": ("residual_in_fp32", True, True),
    "dt_min": ("time_step_min", 1e-3, 1e-3),
    "dt_max": ("time_step_max", 0.1, 0.1),
    "dt_init_floor": ("time_step_floor", 1e-4, 1e-4),
}
# The same settings under flash-linear-attention's names. Its earlier versions used some of both.
FLA_NAMES = {
    "layer_norm_epsilon": "norm_eps",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
    "time_step_limit": "dt_limit",
    "rms_norm": "rmsnorm",
}
_FLA_INIT = {"conv_init", "A_init_range", "fuse_norm", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp"}
# No config of transformers has these. norm_before_gate is not one of them: early configs there have it, and say true.
FLA_ONLY = {*FLA_NAMES.values(), *_FLA_INIT, "D_has_hdim"}

# ours: (theirs, its default there)
OFFICIAL_TOP: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 50277),
    "d_model": ("d_model", 2560),
    "n_layer": ("n_layer", 64),
    "pad_vocab_size_multiple": ("pad_vocab_size_multiple", 8),
    "tie_embeddings": ("tie_embeddings", True),
    "residual_in_fp32": ("residual_in_fp32", True),
}
OFFICIAL_SSM: dict[str, tuple[str, Any]] = {
    "d_state": ("d_state", 128),
    "d_conv": ("d_conv", 4),
    "expand": ("expand", 2),
    "headdim": ("headdim", 64),
    "ngroups": ("ngroups", 1),
    "chunk_size": ("chunk_size", 256),
    "norm_before_gate": ("norm_before_gate", False),
    "conv_bias": ("conv_bias", True),
    "proj_bias": ("bias", False),
    "dt_min": ("dt_min", 1e-3),
    "dt_max": ("dt_max", 0.1),
    "dt_init_floor": ("dt_init_floor", 1e-4),
}
OFFICIAL_NORM_EPS = 1e-5

# Keys that change the function: {theirs: (the values under which it is ours, why there is no other)}.
_Fixed = tuple[tuple[Any, ...], str]
_RMS: _Fixed = ((True,), "normalises by RMSNorm alone")
_ONE_D: _Fixed = ((False, None), "has one D for each head, not for each channel")
_ATTENTION: _Fixed = (([], None, {}), "has no attention")
_MLP: _Fixed = ((0, None), "has no MLPs")
_QUANTIZED: _Fixed = ((None,), "reads weights as floats, not quantised ones")
FIXED_HF: dict[str, _Fixed] = {
    "hidden_act": (("silu", "swish"), "has SiLU alone"),  # two names of one function
    "rms_norm": _RMS,
    "rmsnorm": _RMS,
    "D_has_hdim": _ONE_D,
    "attn": ((None, {}, []), "has no attention"),
    "attn_layer_idx": _ATTENTION,
    "d_intermediate": _MLP,
    "quantization_config": _QUANTIZED,
    "is_encoder_decoder": ((False, None), "is a decoder"),
    "add_cross_attention": ((False, None), "has no attention"),
    "pruned_heads": (({}, None), "has all its heads"),
}
FIXED_TOP: dict[str, _Fixed] = {
    "attn_layer_idx": _ATTENTION,
    "d_intermediate": _MLP,
    "rms_norm": _RMS,
    "quantization_config": _QUANTIZED,
}
FIXED_SSM: dict[str, _Fixed] = {
    "layer": (("Mamba2",), "has Mamba-2 layers alone"),
    "rmsnorm": _RMS,
    "D_has_hdim": _ONE_D,
}

# Keys that say how parameters were drawn, how work is spread or which kernel does it.
OFFICIAL_TOP_OTHER = {"ssm_cfg", "attn_cfg", "fused_add_norm"}  # attn_cfg is read by layers of attention alone
OFFICIAL_SSM_OTHER = {
    *("d_ssm", "dt_limit", "conv_init", "A_init_range", "use_mem_eff_path", "sequence_parallel"),
    *("layer_idx", "process_group", "device", "dtype"),
}
HF_OTHER = {
    *_FLA_INIT,
    *("num_heads", "time_step_limit", "dt_limit", "norm_before_gate", "norm_eps", "dt_min", "dt_max", "dt_init_floor"),
    *("initializer_range", "rescale_prenorm_residual", "time_step_rank", "layer_types", "use_mambapy"),
}

# What any config on the Hugging Face hub may have: the fields of transformers' PretrainedConfig, versions 4 and 5, and
# what training and publishing tools add. None of them is read by a model's forward pass.
GENERIC = {
    # what it is and where it comes from
    *("architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash"),
    *("auto_map", "tokenizer_class", "processor_class", "torch_dtype", "dtype", "torchscript", "use_bfloat16"),
    *("unsloth_version", "unsloth_fixed", "peft_version", "trl_version", "library_name", "license", "base_model"),
    *("finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id", "num_labels", "prefix"),
    *("tf_legacy_loss", "is_decoder", "is_composition", "tie_encoder_decoder", "cross_attention_hidden_size"),
    # what a forward pass returns and how
    *("return_dict", "use_return_dict", "output_hidden_states", "output_attentions", "output_router_logits"),
    *("use_cache", "gradient_checkpointing", "chunk_size_feed_forward", "keys_to_ignore_at_inference"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
    *("experts_implementation", "base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan"),
    # special tokens, which the tokenizer and the caller decide here; a state has no longest text
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "mask_token_id", "cls_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "pad_token", "eos_token", "bos_token"),
    *("max_position_embeddings", "model_max_length", "max_sequence_length", "n_positions", "seq_length"),
    # how to generate
    *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("output_scores", "return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty"),
    *("suppress_tokens", "begin_suppress_tokens", "generation_config"),
}
