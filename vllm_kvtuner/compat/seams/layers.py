"""How attention layers come to their backend, and what is read of a model."""

from vllm_kvtuner.compat.inspection import ANY_KEYWORD, Seam
from vllm_kvtuner.compat.seams.names import WORKER

_ATTENTION = "vllm.model_executor.layers.attention.attention:"
_ROTARY = "vllm.model_executor.layers.rotary_embedding."
_LINEAR = "vllm.model_executor.layers.linear:"

SEAMS = (
    Seam(
        "names of attention backends", "vllm.v1.attention.backends.registry:register_backend",
        "compat.layers.register_backend", ("backend", "class_path"),
    ),
    Seam(
        "new names of attention backends", "vllm.v1.attention.backends.registry:AttentionBackendEnum.register",
        "compat.layers.register_backend", ("name", "value"),
    ),
    Seam(
        "a layer's backend by its name", _ATTENTION + "AttentionBackendEnum.__members__",
        "compat.layers.register_backend",
    ),
    Seam(
        "construction of an attention layer", _ATTENTION + "Attention.__init__",
        "compat.layers.give_layers_their_backend",
        ("cache_config", "prefix", "attn_type", "kv_sharing_target_layer_name", "attn_backend", ANY_KEYWORD),
    ),
    Seam(
        "an attention layer's parts", _ATTENTION + "Attention", "compat.layers.give_layers_their_backend",
        attributes=("head_size", "head_size_v", "impl", "kv_cache", "layer_name", "num_kv_heads"),
    ),
    Seam(
        "construction of a model", "vllm.model_executor.model_loader.base_loader:BaseModelLoader.create_model",
        "compat.layers.check_layers_are_met", ("vllm_config", "model_config", "prefix"), exact=True,
    ),
    Seam(
        "KV cache scheme of a checkpoint",
        "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors:CompressedTensorsConfig",
        "compat.layers.give_layers_their_backend", attributes=("get_quant_method", "kv_cache_scheme"),
    ),
    Seam(
        "tag of the model that is being built", "vllm.compilation.backends:model_tag",
        "compat.layers.give_layers_their_backend",
    ),
    Seam(
        "layers by name", "vllm.config:CompilationConfig", "compat.layers.bind_statics_after_loading",
        attributes=("static_forward_context",),
    ),
    Seam("loading", WORKER + ".load_model", "compat.layers.bind_statics_after_loading"),
    Seam("the loaded model", WORKER + ".get_model", "compat.layers.bind_statics_after_loading", exact=True),
    Seam(
        "a worker's configuration", WORKER, "compat.layers.bind_statics_after_loading", attributes=("vllm_config",)
    ),
    Seam(
        "projection of queries, keys and values", _LINEAR + "QKVParallelLinear", "engine.key_bias.key_bias",
        attributes=("bias", "head_size", "input_size", "num_heads", "num_kv_heads", "skip_bias_add"),
    ),
    Seam(
        "projection of keys alone", _LINEAR + "ColumnParallelLinear", "engine.key_bias.key_bias",
        attributes=("bias", "input_size", "skip_bias_add"),
    ),
    Seam(
        "sums over ranks", "vllm.distributed:tensor_model_parallel_all_reduce", "engine.key_bias.largest_pairs",
        ("input_",), exact=True,
    ),
    Seam(
        "rotary table before rounding", _ROTARY + "base:RotaryEmbeddingBase._compute_cos_sin_cache",
        "engine.statics.rotary_table", exact=True,
    ),
    Seam(
        "rotary table", _ROTARY + "base:RotaryEmbeddingBase", "engine.statics.rotary_table",
        attributes=("cos_sin_cache", "is_neox_style"),
    ),
    Seam(
        "Phi-3's rotary tables", _ROTARY + "phi3_long_rope_scaled_rope:Phi3LongRoPEScaledRotaryEmbedding",
        "engine.statics.rotary_table",
        attributes=("long_short_cos_sin_cache", "original_max_position_embeddings", "use_long_rope"),
    ),
    Seam(
        "M-RoPE", _ROTARY + "mrope:MRotaryEmbedding", "engine.statics.rotary_table",
        attributes=("head_size", "mrope_section"),
    ),
    Seam(
        "models of several positions", "vllm.config:ModelConfig", "engine.mrope.has_several_positions",
        attributes=("supports_multimodal_inputs", "uses_mrope"),
    ),
    Seam(
        "positions of a batch", "vllm.v1.worker.gpu_model_runner:GPUModelRunner", "engine.mrope.MRope",
        attributes=("mrope_positions",),
    ),
    Seam(
        "positions of a batch, as model runner V2 has them", "vllm.v1.worker.gpu.mm.rope:RopeState",
        "engine.mrope.MRope", attributes=("positions",),
    ),
    Seam(
        "a model's state in model runner V2", "vllm.v1.worker.gpu.model_states.default:DefaultModelState",
        "engine.mrope.MRope", attributes=("rope_state",),
    ),
    Seam(
        "what a batch's attention is", "vllm.v1.attention.backend:CommonAttentionMetadata",
        "attention.backend.KVTunerMetadataBuilder", attributes=("causal", "mm_req_doc_ranges", "positions"),
    ),
    Seam(
        "pictures in one step", "vllm.config:SchedulerConfig", "engine.checks.check_config",
        attributes=("disable_chunked_mm_input",),
    ),
    Seam(
        "what is not causal", "vllm.config:ModelConfig", "engine.causality.causality",
        attributes=("is_mm_prefix_lm",),
    ),
    Seam(
        "batches that are not causal", "vllm.config:AttentionConfig", "engine.causality.causality",
        attributes=("use_non_causal",),
    ),
    Seam(
        "CUDA graphs of a metadata builder", "vllm.v1.attention.backend:AttentionMetadataBuilder._cudagraph_support",
        "attention.backend.KVTunerMetadataBuilder",
    ),
)  # fmt: skip
