"""What ranks of one server tell each other: numbers, as many of them everywhere.

Ranks that schedule together wait for one another. Stages of a pipeline decide alike, but not at
once: the first one is a step ahead of the next, which waits for what that sends. If the first one
waited until all have heard, both would wait for ever. So what it tells lies ready until the others
come to the same place.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

Share = Callable[[list[int]], list[int]]
Gather = Callable[[list[int]], list[list[int]]]

# Messages of an engine itself between two ranks have other tags.
TAG = 0x6B76
# How many messages may lie ready: those of many schedules, and no stage is so many behind.
MAX_UNREAD = 1024


def alone(values: list[int]) -> list[int]:
    """Return the numbers as they are: what a single rank has nobody to tell."""
    return values


def alone_of_all(values: list[int]) -> list[list[int]]:
    """Return the numbers of a single rank as those of all ranks."""
    return [values]


def tell_at_once(ranks: Sequence[int], channel: Any) -> Share:
    """Return what has the first rank's numbers on every rank; all wait for it.

    Args:
        ranks: What torch calls each of them.
        channel: torch's group of them on the host.
    """
    import torch  # noqa: PLC0415  an engine of several ranks has it
    from torch import distributed  # noqa: PLC0415  as above

    def share(values: list[int]) -> list[int]:
        numbers = torch.tensor(values, dtype=torch.int64)
        distributed.broadcast(numbers, src=ranks[0], group=channel)
        return [int(number) for number in numbers.tolist()]

    return share


def tell_stages(rank: int, ranks: Sequence[int], channel: Any) -> Share:
    """Return what has the first rank's numbers on every rank; that one waits for nobody.

    Args:
        rank: This one's number in the group.
        ranks: As in `tell_at_once`.
        channel: As in `tell_at_once`.
    """
    import torch  # noqa: PLC0415  as above
    from torch import distributed  # noqa: PLC0415  as above

    unread: deque[Any] = deque()

    def tell(values: list[int]) -> list[int]:
        numbers = torch.tensor(values, dtype=torch.int64)
        for other in ranks[1:]:
            unread.append(distributed.isend(numbers, dst=other, group=channel, tag=TAG))
        while len(unread) > MAX_UNREAD:
            unread.popleft().wait()
        return values

    def hear(values: list[int]) -> list[int]:
        numbers = torch.empty(len(values), dtype=torch.int64)
        distributed.recv(numbers, src=ranks[0], group=channel, tag=TAG)
        return [int(number) for number in numbers.tolist()]

    return hear if rank else tell


def tell_all(ranks: Sequence[int], channel: Any) -> Gather:
    """Return what has the numbers of all ranks on every rank, in their order; all wait for it.

    Args:
        ranks: As in `tell_at_once`.
        channel: As in `tell_at_once`.
    """
    import torch  # noqa: PLC0415  as above
    from torch import distributed  # noqa: PLC0415  as above

    def gather(values: list[int]) -> list[list[int]]:
        numbers = torch.tensor(values, dtype=torch.int64)
        found = [torch.empty_like(numbers) for _ in ranks]
        distributed.all_gather(found, numbers, group=channel)
        return [[int(number) for number in one.tolist()] for one in found]

    return gather
