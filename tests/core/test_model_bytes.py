"""The estimate of a model's weights, against sizes that their publishers give."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_core.memory.model_bytes import files_bytes, find_folder, model_bytes
from kvcached_core.memory.model_shape import shape_bytes

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
QWEN_25_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
QWEN_25_HALF_B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
GEMMA_2_9B = {
    "model_type": "gemma2",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "vocab_size": 256000,
    "tie_word_embeddings": True,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
QWEN_3_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "vocab_size": 201088,
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
}
LLAMA_4_SCOUT = {
    "model_type": "llama4",
    "text_config": {
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "interleave_moe_layer_step": 1,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 16,
        "vocab_size": 202048,
        "tie_word_embeddings": False,
    },
    "vision_config": {"hidden_size": 1408, "intermediate_size": 5632, "num_hidden_layers": 34},
}
GPT_2 = {
    "model_type": "gpt2",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 50257,
    "tie_word_embeddings": True,
}
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
FP8 = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
        "ignore": ["lm_head"],
    }
}

# The size of the weight files on the publishers' pages, in 10^9 bytes; where that is not stated,
# twice the number of parameters.
PUBLISHED = {
    "Llama-3.1-8B": (LLAMA_8B, 16.06),
    "Llama-3.1-70B": (LLAMA_70B, 141.1),
    "Qwen2.5-7B": (QWEN_25_7B, 15.23),
    "Qwen2.5-0.5B, tied": (QWEN_25_HALF_B, 0.988),
    "Gemma-2-9B, tied": (GEMMA_2_9B, 18.48),
    "Mixtral-8x7B": (MIXTRAL, 93.4),
    "DeepSeek-V3, fp8": (DEEPSEEK_V3, 688.6),
    "Qwen3-30B-A3B": (QWEN_3_MOE, 61.06),
    "GPT-OSS-20B, mxfp4": (GPT_OSS_20B, 13.76),
    "Llama-4-Scout": (LLAMA_4_SCOUT, 217.3),
    "GPT-2, no gate": (GPT_2, 0.249),
    "Llama-3.1-8B, AWQ": (LLAMA_8B | AWQ, 5.73),
    "Qwen2.5-7B, GPTQ": (QWEN_25_7B | GPTQ, 5.58),
    "Llama-3.1-8B, fp8": (LLAMA_8B | FP8, 9.08),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("is_object", [False, True], ids=["mapping", "object"])
def test_the_shape_says_a_models_size_within_a_fifth(name: str, *, is_object: bool) -> None:
    config, published = PUBLISHED[name]
    given: Any = SimpleNamespace(**config) if is_object else config
    assert shape_bytes(given, 2).total_bytes / 1e9 == pytest.approx(published, rel=0.2)


def test_ranks_share_layers_and_the_ends_are_on_the_first_and_last_stage() -> None:
    model = shape_bytes(LLAMA_8B, 2)
    assert model.on_rank() == model.total_bytes
    assert model.on_rank(tensor_parallel=4) == model.total_bytes // 4
    words_bytes = 128256 * 4096 * 2
    half = model.layers_bytes // 2 + words_bytes
    assert model.on_rank(pipeline_parallel=2) == half
    assert model.on_rank(tensor_parallel=2, pipeline_parallel=2) == half // 2
    # 32 layers in three stages: the largest has 11 of them
    thirds = model.layers_bytes * 11 // 32 + words_bytes
    assert model.on_rank(pipeline_parallel=3) == thirds


def write(folder: Path, name: str, num_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("wb") as file:
        file.truncate(num_bytes)


def test_files_say_more_than_the_shape(tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors", 10**9)
    found = model_bytes(str(tmp_path), QWEN_25_HALF_B, 2)
    assert found.total_bytes == 10**9
    assert found.first_bytes == 151936 * 896 * 2
    assert found.num_layers == 24


@pytest.mark.parametrize(
    "second_copy",
    [
        ["consolidated.safetensors"],
        ["pytorch_model.bin"],
        ["original/consolidated.00.pth"],
        ["adapter_model.safetensors", "training_args.bin"],
        ["model.safetensors"],  # beside shards that an index names
    ],
)
def test_a_second_copy_is_not_counted(tmp_path: Path, second_copy: list[str]) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for shard in shards:
        write(tmp_path, shard, 500)
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in second_copy:
        path = tmp_path / name
        write(path.parent, path.name, 1000)
    assert files_bytes(tmp_path) == 1000


def test_one_copy_of_whatever_kind_is_found(tmp_path: Path) -> None:
    assert files_bytes(tmp_path) == 0
    write(tmp_path, "consolidated.safetensors", 700)
    assert files_bytes(tmp_path) == 700
    write(tmp_path / "torch", "pytorch_model.bin", 600)
    assert files_bytes(tmp_path / "torch") == 600
    (tmp_path / "torch" / "pytorch_model.bin.index.json").write_text("{ broken")
    assert files_bytes(tmp_path / "torch") == 600
    write(tmp_path, "model.gguf", 500)
    assert files_bytes(tmp_path / "model.gguf") == 500


@pytest.mark.parametrize(("stored", "expected"), [("float32", 500), ("bfloat16", 1000)])
def test_what_is_stored_wider_than_it_is_loaded_counts_as_loaded(
    tmp_path: Path, stored: str, expected: int
) -> None:
    write(tmp_path, "model.safetensors", 1000)
    assert model_bytes(str(tmp_path), {"torch_dtype": stored}, 2).total_bytes == expected


def test_a_name_on_a_hub_is_looked_up_in_the_local_cache(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="an engine brings it")
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    write(snapshot, "model.safetensors", 800)
    write(snapshot, "config.json", 2)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789abcdef")
    assert find_folder("some/model", cache_dir=str(tmp_path)) == snapshot
    assert model_bytes("some/model", {}, 2, cache_dir=str(tmp_path)).total_bytes == 800
    assert find_folder("some/other", cache_dir=str(tmp_path)) is None
    assert find_folder("no name of a hub at all", cache_dir=str(tmp_path)) is None


def test_a_model_that_is_nowhere_is_known_by_its_shape(tmp_path: Path) -> None:
    by_shape = shape_bytes(LLAMA_8B, 2)
    assert model_bytes(str(tmp_path / "gone"), LLAMA_8B, 2) == by_shape
    assert shape_bytes({}, 2).total_bytes == 0


def test_odd_configurations_are_estimated_without_an_error() -> None:
    per_layer = LLAMA_8B | {"num_key_value_heads": [8] * 16 + [4] * 16}
    assert 0.9 < shape_bytes(per_layer, 2).total_bytes / shape_bytes(LLAMA_8B, 2).total_bytes < 1
    assert shape_bytes(LLAMA_8B | {"intermediate_size": {"odd": 1}}, 2).total_bytes > 0
    assert shape_bytes(LLAMA_8B | {"quantization_config": {"quant_method": None}}, 2).num_layers
