"""Fields of megatron-core's TransformerConfig and arguments of its models, releases 0.14 to 0.19.

Every field is on one of three lists. A release that brings a field which is on none gets it refused
by name as soon as it differs from its default (`refusals.check_config`): what it does is not known.

* `NEUTRAL`: no effect on the function in eval mode. Looked up in the sources, where the reason is
  not plain it stands beside the group.
* `MODELLED`: the facades compute what it says, from the field or from the modules built with it.
* `REFUSED`: it changes the function, and no facade computes that.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


NEUTRAL = frozenset().union(
    # How work, weights and messages are spread over processes. (Megatron sets
    # tensor_parallel_num_weight_shards from gtp_weight_remat_size, which is refused above 1.)
    _names("""
        pipeline_model_parallel_comm_backend virtual_pipeline_model_parallel_size
        hierarchical_context_parallel_sizes expert_model_parallel_size expert_tensor_parallel_size
        moe_extended_tp pipeline_dtype variable_seq_lengths overlap_p2p_comm batch_p2p_comm
        batch_p2p_sync use_ring_exchange_p2p deallocate_pipeline_outputs
        overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage
        num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
        pipeline_model_parallel_layout account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split cp_comm_type max_seqlen_per_dp_cp_rank
        tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag
        tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag
        tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1
        tp_comm_bootstrap_backend async_tensor_model_parallel_allreduce symmetric_ar_type
        nccl_all_reduce_for_prefill high_priority_a2a_comm_stream
        tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards
        expert_gtp_weight_remat_size clone_scatter_output_in_embedding
    """),
    # Gradients, losses, optimizer steps, memory of a training step.
    _names("""
        timers finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func
        param_sync_func num_microbatches_with_partial_activation_checkpoints
        gradient_accumulation_fusion cross_entropy_loss_fusion cross_entropy_fusion_impl
        overlap_moe_expert_parallel_comm delay_wgrad_compute defer_embedding_wgrad_compute
        wgrad_deferral_limit barrier_with_L1_time calculate_per_token_loss recompute_granularity
        recompute_method recompute_num_layers distribute_saved_activations recompute_modules
        cpu_offloading cpu_offloading_num_layers _cpu_offloading_context
        cpu_offloading_activations cpu_offloading_weights cpu_offloading_double_buffering
        cpu_offloading_retain_pinned_cpu_buffers fine_grained_activation_offloading offload_modules
        min_offloaded_tensor_size fine_grained_offloading_max_inflight_offloads
        delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
        activation_offload_fraction ep_overlap_early_attn_memory_release
        overlap_dispatch_backward_with_experts_wgrad activation_func_fp8_input_store
        moe_grad_scale_func mtp_grad_scale_func experimental_attention_variant_loss_scale_func
        qk_clip qk_clip_alpha qk_clip_threshold log_max_attention_logit
    """),
    # How weights are initialised.
    _names("""
        perform_initialization use_cpu_initialization init_method output_layer_init_method
        init_method_std embedding_init_method embedding_init_method_std
        init_model_with_meta_device is_hybrid_model use_te_rng_tracker inference_rng_tracker
        inference_sampling_seed
    """),
    # Which kernel computes the same function, and checks and logs of it. Autocast is entered by
    # Megatron's schedules alone; test_mode compares weights of ranks; masked_softmax_fusion is
    # looked at by the attention's facade.
    _names("""
        deterministic_mode enable_autocast autocast_dtype attention_backend flash_attention_version
        attention_softmax_in_fp32 disable_bf16_reduced_precision_matmul masked_softmax_fusion
        persist_layer_norm memory_efficient_layer_norm bias_dropout_fusion apply_rope_fusion
        use_fused_weighted_squared_relu batch_invariant_mode disable_parameter_transpose_cache
        mlp_chunks_for_prefill mlp_chunks_for_training test_mode config_logger_dir
        hetereogenous_dist_checkpoint
    """),
    # Read by Megatron's inference engine alone, which bounds have nothing to do with.
    _names("""
        flash_decode inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
        inference_moe_disable_fused_quant_kernels inference_cuda_graph_scope
        inference_moe_token_dispatcher_type
    """),
    # Read where fp8 or fp4 is set, which is refused.
    _names("""
        fp8_recipe fp8_param fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo
        fp8_wgrad fp8_dot_product_attention fp8_multi_head_attention tp_only_amax_red
        first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp4_recipe
        fp4_param fp8_quantizer_factory fp4_quantizer_factory fp8_output_proj
    """),
    # Read where CUDA graphs are, which are refused.
    _names("""
        cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps
        cuda_graph_scope cuda_graph_modules
    """),
    # Read by layers of experts, which are refused.
    _names("""
        moe_deepep_num_sms moe_shared_expert_intermediate_size moe_shared_expert_overlap
        moe_shared_expert_gate moe_layer_freq moe_ffn_hidden_size moe_router_load_balancing_type
        moe_router_topk moe_router_topk_limited_devices moe_router_padding_for_fp8
        moe_router_padding_for_quantization moe_router_num_groups moe_router_group_topk
        moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function
        moe_router_dtype moe_router_enable_expert_bias moe_router_bias_update_rate
        moe_router_force_load_balancing moe_router_force_biased moe_router_quantile_balancing_ema
        moe_grouped_gemm moe_use_legacy_grouped_gemm moe_aux_loss_coeff moe_z_loss_coeff
        moe_input_jitter_eps moe_token_dropping moe_token_dispatcher_type moe_enable_deepep
        moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms moe_per_layer_logging
        moe_expert_capacity_factor moe_expert_rank_capacity_factor moe_pad_expert_input_to_capacity
        moe_pad_experts_for_cuda_graph_inference moe_token_drop_policy moe_layer_recompute
        moe_permute_fusion moe_permute_fusion_into_hybridep moe_router_fusion
        moe_apply_probs_on_input moe_enable_routing_replay moe_latent_size moe_hybridep_num_sms
        moe_hybridep_num_sms_preprocessing moe_hybridep_num_blocks_permute
        moe_hybridep_num_blocks_unpermute moe_hybridep_pad_uneven_dispatch_inputs
        moe_ncclep_static_shape moe_ncclep_zero_copy moe_single_grouped_weight
        moe_single_grouped_bias moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size
        use_grouped_gemm_for_shared_expert moe_paged_stash moe_paged_stash_page_size
        moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu
    """),
    # Read by multi-token prediction, Mamba layers and other attentions, which are refused; of
    # sliding windows where window_size is set, which is.
    _names("""
        mtp_loss_scaling_factor mtp_standalone mtp_use_repeated_layer mtp_hybrid_override_pattern
        mtp_detach_heads mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
        use_mamba_mem_eff_path mamba_training_ssm_states_dtype dsa_indexer_n_heads
        dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss
        dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_kernel_backend
        dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu
        dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 linear_conv_kernel_dim
        linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads
        kitchen_attention_backend window_attn_skip_freq mrope_section
    """),
)

MODELLED = frozenset().union(
    _names("""
        tensor_model_parallel_size pipeline_model_parallel_size sequence_parallel fp16 bf16
        params_dtype num_layers hidden_size num_attention_heads softmax_scale num_query_groups
        ffn_hidden_size kv_channels hidden_dropout attention_dropout fp32_residual_connection
        layernorm_epsilon layernorm_zero_centered_gamma add_bias_linear add_qkv_bias
        gated_linear_unit activation_func glu_linear_offset rotary_interleaved normalization
        qk_layernorm qk_l2_norm no_rope_freq apply_query_key_layer_scaling bias_activation_fusion
    """),
    # muP: factors of the embedding and of GPTModel's logits; softmax_scale follows from the others.
    _names("""
        use_mup mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult
        mup_base_head_dim mup_attn_scale_power
    """),
)

REFUSED = {
    "fp8": "fp8 weights and activations are",
    "fp4": "fp4 weights and activations are",
    "quant_recipe": "quantisation is",
    "multi_latent_attention": "multi-latent attention is",
    "experimental_attention_variant": "this attention is",
    "linear_attention_freq": "linear attention is",
    "attention_output_gate": "gates of the attention's output are",
    "softmax_type": "an offset in the softmax is",
    "window_size": "sliding windows are",
    "apply_residual_connection_post_layernorm": "(megatron-core ignores it) it is",
    "activation_func_clamp_value": "clamped activations are",
    "use_te_activation_func": "activations of TransformerEngine are",
    "use_transformer_engine_op_fuser": "TransformerEngine's fused MLP is",
    "use_grouped_gemm_for_dense_mlp": "it is",
    "fused_residual_rmsnorm": "norms that return the residual are",
    "fused_single_qkv_rope": "it is",
    "num_moe_experts": "MoE layers, whose tokens are routed by values, are",
    "mtp_num_layers": "multi-token prediction is",
    "heterogeneous_block_specs": "layers of different kinds are",
    "context_parallel_size": "context parallelism is",
    "hybrid_context_parallel": "context parallelism is",
    "gtp_weight_remat_size": "(a rank's weights are parts of its shard) it is",
    "enable_cuda_graph": "(a graph replays what was captured) it is",
    "external_cuda_graph": "(a graph replays what was captured) it is",
    "cuda_graph_impl": "(a graph replays what was captured) it is",
    "use_kitchen": "it is",
    "use_kitchen_attention": "it is",
    "transformer_impl": "it is",
    "use_inference_optimized_layers": "it is",
    "inference_fuse_tp_communication": "it is",
    # Of releases to come.
    "enable_hyper_connections": "hyper connections are",
    "enable_mhc_connections": "hyper connections are",
}
"""Field -> the beginning of what is said: '... not supported'."""

ALLOWED = {"transformer_impl": ("local", "transformer_engine")}
"""Values besides its default of a field in `REFUSED` that change nothing."""

NEUTRAL_ARGUMENTS = _names("""
    transformer_layer_spec max_sequence_length fp16_lm_cross_entropy pg_collection model_comm_pgs
    vp_stage
""")
"""Of GPTModel and BertModel: what their modules are built of and how; those are looked at."""

MODELLED_ARGUMENTS = _names("""
    config vocab_size pre_process post_process parallel_output share_embeddings_and_output_weights
    position_embedding_type rotary_percent rotary_base rope_scaling rope_scaling_factor
    seq_len_interpolation_factor num_tokentypes add_binary_head
    scatter_embedding_sequence_parallel
""")
"""Of them: read from the model or from the modules built with them; what is not supported (stages
of a pipeline, other position embeddings) is refused there."""

REFUSED_ARGUMENTS = _names("mtp_block_spec return_embeddings")
"""Of them: anything but the default is refused."""

HYBRID_ARGUMENTS = _names("""
    hybrid_stack_spec mamba_stack_spec hybrid_layer_pattern hybrid_override_pattern
    hybrid_attention_ratio hybrid_mlp_ratio
""")
"""Of HybridModel (MambaModel) alone: which layers it is built of; those are looked at."""

# Configurations of Megatron-Bridge hold the models' arguments too.
KNOWN = NEUTRAL | MODELLED | NEUTRAL_ARGUMENTS | MODELLED_ARGUMENTS | HYBRID_ARGUMENTS
"""Fields that need no look."""
