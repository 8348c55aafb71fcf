"""Sparse block ids as a tensor on the device, where an engine keeps its list of free ones there."""

from collections.abc import Sequence

import torch

from kvcached_core.errors import PageStateError
from kvcached_core.memory.geometry import Geometry

FULLEST_FIRST = 1 << 31  # above every id, so pages are in order before the ids on them are


def ids_on(pages: Sequence[int], geometry: Geometry, device: torch.device) -> torch.Tensor:
    """Return the ids of all blocks on `pages`, in that order; the device is not waited for."""
    first = torch.tensor(pages, dtype=torch.int64) * geometry.ids_per_page
    ids = first[:, None] + torch.arange(geometry.blocks_per_page)
    return ids.reshape(-1).to(device, non_blocking=True)


def pages_of(ids: torch.Tensor, geometry: Geometry) -> list[int]:
    """Return the pages that blocks are on, each once. It waits for the device."""
    pages: list[int] = torch.unique(ids // geometry.ids_per_page).tolist()
    return pages


def without(ids: torch.Tensor, pages: Sequence[int], geometry: Geometry) -> torch.Tensor:
    """Return `ids` but for those on `pages`, all of whose blocks have to be among them.

    Raises:
        PageStateError: If they are not.
    """
    closed = torch.tensor(pages, device=ids.device)
    left = ids[~torch.isin(ids // geometry.ids_per_page, closed)]
    if len(ids) - len(left) != len(pages) * geometry.blocks_per_page:
        raise PageStateError(f"pages {sorted(pages)} cannot be closed: not all are empty")
    return left


def fullest_first(
    ids: torch.Tensor, geometry: Geometry, num_pages: int
) -> tuple[torch.Tensor, list[int]]:
    """Return `ids` with those on the fullest pages first, and the pages that have all of theirs.

    It waits for the device. These pages are in ascending order.
    """
    pages = ids // geometry.ids_per_page
    num_free = torch.bincount(pages, minlength=num_pages)
    empty = (num_free == geometry.blocks_per_page).nonzero().flatten().tolist()
    return ids[torch.argsort(num_free[pages] * FULLEST_FIRST + ids)], empty
