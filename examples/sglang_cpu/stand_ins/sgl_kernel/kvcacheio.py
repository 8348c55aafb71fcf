"""The same for `sgl_kernel.kvcacheio`."""

from sgl_kernel import __getattr__ as __getattr__  # noqa: PLC0414  exported as it is
