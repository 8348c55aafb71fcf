"""How many bytes a model's weights take by its shape: what a configuration says of its matrices."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

# These have two matrices in an MLP, not three: no gate.
UNGATED = {"bloom", "falcon", "gpt2", "gpt_neox", "gptj", "mpt", "opt", "phi", "starcoder2"}
SCALE_BYTES = 2  # of a group of quantised weights
# Of the types that a configuration names.
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelBytes:
    """What the parts of a model take, in bytes.

    Attributes:
        first_bytes: Before the layers: embeddings, encoders of pictures and sound.
        layers_bytes: All layers.
        last_bytes: Behind the layers: the output matrix, where it is not the embeddings.
        num_layers: How many layers there are.
    """

    first_bytes: int
    layers_bytes: int
    last_bytes: int
    num_layers: int

    @property
    def total_bytes(self) -> int:
        """The whole model."""
        return self.first_bytes + self.layers_bytes + self.last_bytes

    def on_rank(self, *, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> int:
        """Return what the rank with most of it holds.

        Tensor parallel ranks share every part. A stage of a pipeline has some of the layers, and
        the first and the last one what comes before and behind them.
        """
        if pipeline_parallel == 1:
            return self.total_bytes // tensor_parallel
        num_layers = ceil(self.num_layers / pipeline_parallel)
        share = self.layers_bytes * num_layers // max(self.num_layers, 1)
        return (share + max(self.first_bytes, self.last_bytes)) // tensor_parallel

    def scaled_to(self, total_bytes: int) -> "ModelBytes":
        """Return the same model with another size: the layers have what is more or less."""
        ends = self.first_bytes + self.last_bytes
        if ends >= total_bytes:
            return ModelBytes(0, total_bytes, 0, max(self.num_layers, 1))
        return ModelBytes(
            self.first_bytes, total_bytes - ends, self.last_bytes, max(self.num_layers, 1)
        )


def shape_bytes(config: Any, dtype_bytes: int) -> ModelBytes:
    """Return what the matrices of a transformer take, from its configuration alone."""
    text = text_config(config)
    of = _reader(text)
    hidden, num_layers = of("hidden_size"), of("num_hidden_layers")
    weights = _Widths(_quantization(config) or _quantization(text), dtype_bytes)
    attention_bytes = _num_attention_weights(text) * weights.attention
    layers_bytes = sum(
        attention_bytes + _mlp_bytes(text, weights, is_sparse=is_sparse)
        for is_sparse in _sparse_layers(text, num_layers)
    )
    words_bytes = of("vocab_size") * hidden * dtype_bytes
    is_tied = _get(text, "tie_word_embeddings", None) or _get(config, "tie_word_embeddings", None)
    return ModelBytes(
        first_bytes=words_bytes + _encoder_bytes(config, dtype_bytes),
        layers_bytes=int(layers_bytes),
        last_bytes=0 if is_tied else words_bytes,
        num_layers=num_layers,
    )


class _Widths:
    """Bytes of a weight: in attention, and in the MLPs, of which experts are a part."""

    def __init__(self, quantization: Mapping[str, Any], dtype_bytes: int) -> None:
        width = _quantized_bytes(quantization) or dtype_bytes
        kept = quantization.get("modules_to_not_convert") or quantization.get("ignore") or ()
        keeps_attention = any("attn" in str(name) for name in kept)
        self.attention = dtype_bytes if keeps_attention else width
        self.mlp = width


def _quantized_bytes(quantization: Mapping[str, Any]) -> float:
    """Return the bytes of a quantised weight, its share of the scales included; 0: it is none."""
    method = str(quantization.get("quant_method", "")).lower()
    group = quantization.get("group_size") or 0
    bits = quantization.get("bits") or quantization.get("w_bit") or 0
    for scheme in (quantization.get("config_groups") or {}).values():  # compressed-tensors
        weights = scheme.get("weights") or {}
        bits, group = weights.get("num_bits", bits), weights.get("group_size") or 0
    algorithm = str(quantization.get("quant_algo", "")).lower()
    if not bits:
        if "mxfp4" in method or "nvfp4" in algorithm or quantization.get("load_in_4bit"):
            bits, group = 4, group or 32
        elif "fp8" in method or "fp8" in algorithm or quantization.get("load_in_8bit"):
            bits = 8
    if not bits:
        return 0.0
    scales = (SCALE_BYTES + bits / 8) / group if group > 0 and bits < 8 else 0.0  # noqa: PLR2004
    return float(bits / 8 + scales)


def _num_attention_weights(text: Any) -> int:
    of = _reader(text)
    hidden, num_heads = of("hidden_size"), of("num_attention_heads") or 1
    kv_rank = of("kv_lora_rank")
    if kv_rank:  # latent attention
        nope, rope, value = of("qk_nope_head_dim"), of("qk_rope_head_dim"), of("v_head_dim")
        q_rank = of("q_lora_rank")
        query = num_heads * (nope + rope)
        num_query = (hidden + query) * q_rank if q_rank else hidden * query
        num_key = hidden * (kv_rank + rope) + kv_rank * num_heads * (nope + value)
        return num_query + num_key + num_heads * value * hidden
    head = of("head_dim") or hidden // num_heads
    num_kv_heads = of("num_key_value_heads") or num_heads
    return 2 * hidden * head * (num_heads + num_kv_heads)


def _mlp_bytes(text: Any, weights: _Widths, *, is_sparse: bool) -> float:
    of = _reader(text)
    hidden = of("hidden_size")
    num_matrices = 2 if _get(text, "model_type", "") in UNGATED else 3
    inner = of("intermediate_size") or of("ffn_dim") or 4 * hidden
    if not is_sparse:
        inner = of("intermediate_size_mlp") or inner  # the dense layers of Llama 4
        return num_matrices * hidden * inner * weights.mlp
    expert = of("moe_intermediate_size") or inner
    shared = of("shared_expert_intermediate_size") or of("n_shared_experts") * expert
    if of("intermediate_size_mlp"):
        shared = expert
    return num_matrices * hidden * (_num_experts(text) * expert + shared) * weights.mlp


def _num_experts(text: Any) -> int:
    of = _reader(text)
    return of("n_routed_experts") or of("num_local_experts") or of("num_experts")


def _sparse_layers(text: Any, num_layers: int) -> Iterator[bool]:
    """Yield for each layer whether it has experts."""
    of = _reader(text)
    num_experts, num_dense = _num_experts(text), of("first_k_dense_replace")
    every = of("decoder_sparse_step") or of("interleave_moe_layer_step") or 1
    dense = _get(text, "mlp_only_layers", None) or ()
    for layer in range(num_layers):
        is_due = (layer + 1) % every == 0
        yield num_experts > 1 and layer >= num_dense and is_due and layer not in dense


def _encoder_bytes(config: Any, dtype_bytes: int) -> int:
    num_weights = 0
    for name in ("vision_config", "audio_config"):
        of = _reader(_get(config, name, None) or {})
        hidden = of("hidden_size") or of("embed_dim") or of("d_model")
        num_layers = of("num_hidden_layers") or of("depth") or of("encoder_layers")
        inner = of("intermediate_size") or of("encoder_ffn_dim") or 4 * hidden
        num_weights += num_layers * (4 * hidden * hidden + 2 * hidden * inner)
    return num_weights * dtype_bytes


def text_config(config: Any) -> Any:
    """Return the configuration of the part of a model that reads text."""
    if _get(config, "hidden_size", None) and _get(config, "num_hidden_layers", None):
        return config
    for name in ("text_config", "llm_config", "language_config", "thinker_config"):
        inner = _get(config, name, None)
        if inner is not None:
            return text_config(inner)
    return config


def stored_element_bytes(config: Any) -> int:
    """Return what an element takes in a model's files; 0 if that differs, or nobody says it."""
    if _quantization(config):
        return 0
    name = str(_get(config, "dtype", None) or _get(config, "torch_dtype", None) or "")
    return ELEMENT_BYTES.get(name.removeprefix("torch."), 0)


def _quantization(config: Any) -> Mapping[str, Any]:
    found = _get(config, "quantization_config", None) or {}
    if isinstance(found, Mapping):
        return found
    values: Mapping[str, Any] = found.to_dict() if hasattr(found, "to_dict") else vars(found)
    return values


def _reader(config: Any) -> Callable[[str], int]:
    def of(name: str) -> int:
        value = _get(config, name, None)
        try:
            if isinstance(value, list | tuple):  # one for each layer
                value = sum(value) / len(value) if value else 0
            return int(value or 0)
        except (TypeError, ValueError):  # an estimate must not end a start
            return 0

    return of


def _get(config: Any, name: str, default: Any) -> Any:
    if isinstance(config, Mapping):
        return config.get(name, default)
    return getattr(config, name, default)
