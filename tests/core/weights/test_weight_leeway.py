"""Work that must not fail for want of a little memory has what was kept back for it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcached_core.errors import OutOfMemoryError
from kvcached_core.weights.leeway import NUM_TENSORS, Leeway


class FullDevice:
    """A device on which so many tensors fit as `num_left` says; those that are kept count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_left: int) -> None:
        self.num_left = num_left
        monkeypatch.setattr(torch, "empty", self._take)

    def _take(self, *_: Any, **__: Any) -> "Kept":
        if not self.num_left:
            raise torch.OutOfMemoryError
        self.num_left -= 1
        return Kept(self)


class Kept:
    def __init__(self, device: FullDevice) -> None:
        self._device = device

    def __del__(self) -> None:
        self._device.num_left += 1


def cuda() -> Any:
    return SimpleNamespace(type="cuda")


def test_work_on_a_full_device_has_what_was_kept_back_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = FullDevice(monkeypatch, NUM_TENSORS)
    leeway = Leeway(cuda())
    assert device.num_left == 0
    for _ in range(2):
        assert leeway.use(lambda: len([torch.empty(1) for _ in range(NUM_TENSORS)])) == NUM_TENSORS
        assert device.num_left == 0


def test_where_that_is_not_enough_the_error_is_ours_and_it_is_had_again_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = FullDevice(monkeypatch, NUM_TENSORS)
    leeway = Leeway(cuda())
    with pytest.raises(OutOfMemoryError, match="look at pages"):
        leeway.use(lambda: [torch.empty(1) for _ in range(NUM_TENSORS + 1)])
    assert device.num_left == 0


def test_on_the_host_nothing_is_kept_back() -> None:
    leeway = Leeway(torch.device("cpu"))
    assert leeway.use(lambda: 7) == 7
