"""The same for `sgl_kernel.mamba`, and operators that SGLang looks up beside it, without a body."""

import torch

from sgl_kernel import __getattr__ as __getattr__  # noqa: PLC0414  exported as it is

OPERATORS = ("fused_gdn_gating_cpu", "fused_sigmoid_gating_delta_rule_update_cpu")

_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for _name in OPERATORS:
    _library.define(f"{_name}(Tensor input) -> Tensor")
