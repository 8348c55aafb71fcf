"""How many cards an operator needs who gives every model a fixed part of one: static's own cost."""

from collections.abc import Sequence

from multi_model.modes import SLEEPING_BYTES


def static_needs(weights_bytes: Sequence[int], kv_bytes: Sequence[int]) -> list[int]:
    """Return what each model takes of a card that is split: weights, the most KV, and the rest.

    The rest is the engine's context, graphs and buffers, the same for each.

    Args:
        weights_bytes: Of each model.
        kv_bytes: The most KV memory that each one held in the run.
    """
    return [
        weights + kv + SLEEPING_BYTES for weights, kv in zip(weights_bytes, kv_bytes, strict=True)
    ]


def num_cards(needs: Sequence[int], card_bytes: int) -> int | None:
    """Return on how many cards these fit, the largest laid first, each on the first with room.

    That is what an operator finds by hand; now and then a better order needs one card less.

    Args:
        needs: Bytes of each model; none is split over cards.
        card_bytes: What a card has.

    Returns:
        The number, or None where one model is larger than a card.
    """
    free: list[int] = []
    for need in sorted(needs, reverse=True):
        if need > card_bytes:
            return None
        place = next((number for number, left in enumerate(free) if left >= need), None)
        if place is None:
            free.append(card_bytes - need)
        else:
            free[place] -= need
    return len(free)
