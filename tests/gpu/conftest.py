"""A GPU, or a failure: a check that was asked for is never skipped."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def device() -> None:
    import torch

    assert torch.cuda.is_available(), "these checks need a CUDA device"
    torch.zeros(1, device="cuda")
