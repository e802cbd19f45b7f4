"""LLaMA-Factory's keys, by what they mean for an export.

Keys that change the merged files are fields of `ExportConfig`. The others are listed here: those
that have no effect on an export are accepted with a note, so that a user's YAML works as it is;
those that would change the result in a way that this version does not do are refused by name.
"""

from __future__ import annotations

__all__ = ["LEGACY_NAMES", "NO_EFFECT_KEYS", "REFUSED_KEYS", "TRAINING_KEYS"]

# of the model, data, fine-tuning and generation groups of LLaMA-Factory 0.9
NO_EFFECT_KEYS = frozenset(
    """
    use_fast_tokenizer split_special_tokens low_cpu_mem_usage flash_attn shift_attn use_unsloth_gc
    enable_liger_kernel moe_aux_loss_coef disable_gradient_checkpointing use_reentrant_gc
    upcast_layernorm upcast_lmhead_output infer_backend offload_folder use_v1_kernels ms_hub_token
    om_hub_token print_param_status trust_remote_code init_special_tokens
    quantization_method quantization_type double_quantization quantization_device_map fp8
    fp8_backend fp8_enable_fsdp_float8_all_gather image_max_pixels image_min_pixels
    image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels video_fps video_maxlen
    use_audio_in_video audio_sampling_rate vllm_maxlen vllm_gpu_util vllm_enforce_eager
    vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config
    sglang_lora_backend kt_optimize_rule cpu_infer chunk_size mode kt_maxlen kt_use_cuda_graph
    kt_mode kt_force_think dataset eval_dataset dataset_dir media_dir cutoff_len train_on_prompt
    mask_history streaming buffer_size mix_strategy interleave_probs overwrite_cache
    preprocessing_batch_size preprocessing_num_workers max_samples eval_num_beams
    ignore_pad_token_for_loss val_size eval_on_each_dataset packing neat_packing tool_format
    default_system enable_thinking preserve_thinking tokenized_path data_shared_file_system
    freeze_trainable_layers freeze_trainable_modules freeze_extra_modules additional_target
    lora_alpha lora_dropout lora_rank lora_target loraplus_lr_ratio loraplus_lr_embedding use_rslora
    use_dora pissa_init pissa_iter pissa_convert create_new_adapter module_dropout oft_rank
    oft_block_size oft_target pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing
    kto_chosen_weight kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm
    ppo_target ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit
    reward_model reward_model_adapters reward_model_quantization_bit reward_model_type ld_alpha
    use_galore galore_target galore_rank galore_update_interval galore_scale galore_proj_type
    galore_layerwise use_apollo apollo_target apollo_rank apollo_update_interval apollo_scale
    apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front use_badam
    badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio
    badam_mask_mode badam_verbose use_swanlab swanlab_project swanlab_workspace swanlab_run_name
    swanlab_mode swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret
    pure_bf16 use_llama_pro use_adam_mini use_mca use_muon use_dft_loss freeze_vision_tower
    freeze_multi_modal_projector freeze_language_model compute_accuracy disable_shuffling
    early_stopping_steps plot_loss include_effective_tokens_per_second do_sample temperature top_p
    top_k num_beams max_length max_new_tokens repetition_penalty length_penalty system_message
    skip_special_tokens visual_inputs
    """.split()
)

# a value other than these would change the result; each with what to do instead
REFUSED_KEYS: dict[str, tuple[object, str]] = {
    "rope_scaling": (
        None,
        "set rope_scaling and max_position_embeddings in the exported config.json",
    ),
    "mixture_of_depths": (None, "mixture-of-depths models are not exported"),
    "train_from_scratch": (False, "an export starts from the base's weights"),
    "use_unsloth": (False, "remove it: the adapter is merged from its files, whoever trained it"),
    "use_kt": (False, "remove it: the adapter is merged from its files, whoever trained it"),
}

# Hugging Face's TrainingArguments, as far as training YAMLs use them
TRAINING_KEYS = frozenset(
    """
    do_train do_eval do_predict output_dir overwrite_output_dir learning_rate num_train_epochs
    max_steps per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
    lr_scheduler_type warmup_ratio warmup_steps weight_decay max_grad_norm logging_steps logging_dir
    save_steps save_strategy save_total_limit save_only_model eval_steps eval_strategy
    evaluation_strategy bf16 fp16 tf32 deepspeed fsdp fsdp_config gradient_checkpointing optim
    adam_beta1 adam_beta2 adam_epsilon ddp_timeout resume_from_checkpoint report_to run_name seed
    data_seed dataloader_num_workers group_by_length remove_unused_columns predict_with_generate
    include_num_input_tokens_seen push_to_hub hub_model_id load_best_model_at_end
    metric_for_best_model local_rank run_id
    """.split()
)

LEGACY_NAMES = {
    "new_special_tokens": "add_special_tokens",
    "checkpoint_dir": "adapter_name_or_path",
}
