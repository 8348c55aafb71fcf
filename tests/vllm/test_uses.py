"""What we lean on in vLLM is in the table, and what a patched build changes of it is refused."""

import pytest
from helpers.uses_contract import *  # noqa: F403  the tests that every adapter passes
from helpers.uses_contract import Leaning

from kvcached_patches import vllm

pytestmark = [pytest.mark.vllm, pytest.mark.older_release]


@pytest.fixture(scope="module")
def adapter() -> Leaning:
    return Leaning("vllm", vllm.USES)
