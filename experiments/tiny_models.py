"""Tiny models of Transformers, of each family that the adapter steers; 4.57 and 5 alike."""

from __future__ import annotations

from typing import Any

import torch

NUM_EXPERTS, TOP_K, VOCABULARY = 8, 2, 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": TOP_K,
}
_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 4,
    "topk_group": 3,
    "routed_scaling_factor": 2.5,
}
_QWEN: dict[str, Any] = {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 16}
# Class name of configuration and model without suffix, and what the family adds.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": NUM_EXPERTS}),
    "qwen2_moe": ("Qwen2Moe", _QWEN | {"shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3Moe", _QWEN | {"norm_topk_prob": True, "head_dim": 16}),
    "qwen3_moe, full weights": ("Qwen3Moe", _QWEN | {"norm_topk_prob": False, "head_dim": 16}),
    "olmoe": ("Olmoe", {"num_experts": NUM_EXPERTS}),
    "deepseek_v3": ("DeepseekV3", _DEEPSEEK),
    "deepseek_v2": ("DeepseekV2", _DEEPSEEK | {"topk_method": "group_limited_greedy"}),
    "deepseek_v2, greedy": ("DeepseekV2", _DEEPSEEK | {"topk_method": "greedy"}),
    "gpt_oss": ("GptOss", {"num_local_experts": NUM_EXPERTS, "head_dim": 16}),
}


def tiny_model(family: str, seed: int = 0, **more: Any) -> torch.nn.Module:
    """A causal language model of a family, in training mode."""
    import transformers

    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(_SIZES | options | more))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():  # initial routers are so flat that nothing tells them from ties
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("gate.weight", "router.weight")):
                parameter.normal_(std=0.5)
    return model.train()


def batch(size: int = 8, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Token numbers ``[size, length]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (size, length), generator=generator)
