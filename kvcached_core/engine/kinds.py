"""What is elastic of an engine that does more than answer texts, or something else."""


def elastic_parts(engine: str, *, generates: bool, is_multimodal: bool) -> str | None:
    """Return one line for the log that says what comes and goes; None where tokens are all.

    Args:
        engine: Its name, as it is written.
        generates: Whether it answers with tokens; otherwise it embeds or judges prompts.
        is_multimodal: Whether it takes more than text.
    """
    rest = f"what of its weights and buffers does not yield is {engine}'s as without kvcached"
    if not generates:
        return (
            "this server embeds or scores prompts: their keys and values are elastic, also those "
            f"that are cached; {rest}"
        )
    if is_multimodal:
        return (
            "this server takes more than text: keys and values of all tokens are elastic; what "
            f"an encoder computes, and {engine}'s cache of that, are not; {rest}"
        )
    return None
