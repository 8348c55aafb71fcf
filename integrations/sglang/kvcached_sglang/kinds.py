"""What is elastic of a server that does more than answer with tokens, or something else."""

from typing import Any

_MEMORY = "what of its weights and buffers does not yield is SGLang's as without kvcached"


def elastic_parts(model_config: Any) -> str | None:
    """Return one line for the log that says what comes and goes; None where tokens are all.

    Args:
        model_config: SGLang's, of the model that is served.
    """
    if not model_config.is_generation:
        return (
            "this server embeds or scores prompts: their keys and values are elastic, also those "
            f"that are cached; {_MEMORY}"
        )
    if model_config.is_multimodal:
        return (
            "this server takes more than text: keys and values of all tokens are elastic; what "
            f"an encoder computes, and SGLang's cache of that, are not; {_MEMORY}"
        )
    return None
