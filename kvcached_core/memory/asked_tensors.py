"""Tensors that an engine asks torch for, and that are made by us instead."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class AskedTensors(TorchFunctionMode):
    """While it is active, `answer` may make what torch is asked for; all else is torch's."""

    def answer(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor | None:
        """Return the tensor that a call of torch's gets, or None where it is not one of ours."""
        raise NotImplementedError

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See `TorchFunctionMode`."""
        del types
        kwargs = kwargs or {}
        made = self.answer(function, args, kwargs)
        return function(*args, **kwargs) if made is None else made
