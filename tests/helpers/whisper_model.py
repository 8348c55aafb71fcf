"""A tiny Whisper with random weights, made on the spot: what it says depends on what it hears."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from kvcached_demo.harness.model import _tokenizer, save_tokenizer

HIDDEN, INNER, VOCABULARY, NUM_LAYERS, NUM_HEADS = 64, 128, 600, 2, 2
NUM_MELS, SOUND_POSITIONS, TEXT_POSITIONS, START_TOKEN = 80, 1500, 448, 3
SAMPLES_PER_SECOND = 16_000
CONFIG = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "is_encoder_decoder": True,
    "d_model": HIDDEN,
    "num_hidden_layers": NUM_LAYERS,
    "num_mel_bins": NUM_MELS,
    "vocab_size": VOCABULARY,
    "max_source_positions": SOUND_POSITIONS,
    "max_target_positions": TEXT_POSITIONS,
    "activation_function": "gelu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "decoder_start_token_id": START_TOKEN,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "torch_dtype": "float32",
    **{f"{part}_layers": NUM_LAYERS for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": NUM_HEADS for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": INNER for part in ("encoder", "decoder")},
}
SOUNDS = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "processor_class": "WhisperProcessor",
    "feature_size": NUM_MELS,
    "sampling_rate": SAMPLES_PER_SECOND,
    "hop_length": 160,
    "chunk_length": 30,
    "n_fft": 400,
    "padding_value": 0.0,
    "return_attention_mask": False,
}


def make_whisper(folder: Path) -> Path:
    """Write the model, a tokenizer, and how sounds become features, to `folder`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(SOUNDS, indent=2))
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(
        _tokenizer(), folder, model_max_length=TEXT_POSITIONS, tokenizer_class="WhisperTokenizer"
    )
    return folder


def sound(seed: int) -> np.ndarray:
    """Return a few seconds of five tones."""
    random = np.random.default_rng(seed)
    times = np.arange(SAMPLES_PER_SECOND * (2 + seed % 5)) / SAMPLES_PER_SECOND
    tones = [
        random.random() * np.sin(2 * np.pi * frequency * times)
        for frequency in random.uniform(100, 4000, 5)
    ]
    return np.asarray(sum(tones), np.float32)


def _weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    weights: dict[str, np.ndarray] = {}

    def matrix(name: str, *shape: int, gain: float = 1.0) -> None:
        values = random.standard_normal(shape) * gain * float(np.prod(shape[1:])) ** -0.5
        weights[f"model.{name}"] = np.asarray(values, np.float32)

    def vector(name: str, length: int, value: float = 0.0) -> None:
        weights[f"model.{name}"] = np.full(length, value, np.float32)

    def norm(name: str) -> None:
        vector(f"{name}.weight", HIDDEN, 1.0)
        vector(f"{name}.bias", HIDDEN)

    for number, channels in ((1, NUM_MELS), (2, HIDDEN)):
        matrix(f"encoder.conv{number}.weight", HIDDEN, channels, 3)
        vector(f"encoder.conv{number}.bias", HIDDEN)
    matrix("encoder.embed_positions.weight", SOUND_POSITIONS, HIDDEN, gain=8)
    matrix("decoder.embed_positions.weight", TEXT_POSITIONS, HIDDEN, gain=2)
    matrix("decoder.embed_tokens.weight", VOCABULARY, HIDDEN, gain=8)
    for part, attentions in (
        ("encoder", ["self_attn"]),
        ("decoder", ["self_attn", "encoder_attn"]),
    ):
        for layer in range(NUM_LAYERS):
            prefix = f"{part}.layers.{layer}"
            for attention in attentions:
                for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    gain = 4 if projection in {"q_proj", "k_proj"} else 2
                    matrix(f"{prefix}.{attention}.{projection}.weight", HIDDEN, HIDDEN, gain=gain)
                    if projection != "k_proj":
                        vector(f"{prefix}.{attention}.{projection}.bias", HIDDEN)
                norm(f"{prefix}.{attention}_layer_norm")
            matrix(f"{prefix}.fc1.weight", INNER, HIDDEN)
            vector(f"{prefix}.fc1.bias", INNER)
            matrix(f"{prefix}.fc2.weight", HIDDEN, INNER)
            vector(f"{prefix}.fc2.bias", HIDDEN)
            norm(f"{prefix}.final_layer_norm")
        norm(f"{part}.layer_norm")
    return weights
