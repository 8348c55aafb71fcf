"""Tiny random Llama models, made on the spot: real weights and a real tokenizer, no download."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

TEXT = (
    "memory follows the load and goes where a request needs it page by page engines share one "
    "device fairly when a burst comes blocks are mapped and when it ends they are given back"
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KV_BYTES_PER_TOKEN = 4 * 2 * 8 * 128 * 4  # layers, K and V, heads, head_dim, float32


def make_model(folder: Path, *, seed: int) -> Path:
    """Write a model of `CONFIG` with random weights, and its tokenizer, to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    save_file(_weights(seed), folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(_tokenizer(), folder, model_max_length=CONFIG["max_position_embeddings"])
    return folder


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **settings: object) -> None:
    """Write a tokenizer to a model's folder, with the special tokens that our models have."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))


def _weights(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    hidden, inner, vocabulary = 128, 256, 512
    heads = 8 * 128

    def matrix(rows: int, columns: int) -> np.ndarray:
        values = random.standard_normal((rows, columns)) * columns**-0.5
        return np.asarray(values, np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(vocabulary, hidden) * np.float32(hidden**0.5),
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": matrix(vocabulary, hidden),
    }
    for layer in range(4):
        prefix = f"model.layers.{layer}."
        weights |= {
            f"{prefix}input_layernorm.weight": np.ones(hidden, np.float32),
            f"{prefix}post_attention_layernorm.weight": np.ones(hidden, np.float32),
            f"{prefix}self_attn.q_proj.weight": matrix(heads, hidden),
            f"{prefix}self_attn.k_proj.weight": matrix(heads, hidden),
            f"{prefix}self_attn.v_proj.weight": matrix(heads, hidden),
            f"{prefix}self_attn.o_proj.weight": matrix(hidden, heads),
            f"{prefix}mlp.gate_proj.weight": matrix(inner, hidden),
            f"{prefix}mlp.up_proj.weight": matrix(inner, hidden),
            f"{prefix}mlp.down_proj.weight": matrix(hidden, inner),
        }
    return weights


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))  # noqa: S106  a token of the vocabulary
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=512,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 8, trainer)
    return tokenizer
