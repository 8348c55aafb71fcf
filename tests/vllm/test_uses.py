"""What we lean on in vLLM is in the table, and what a patched build changes of it is refused."""

from dataclasses import fields, is_dataclass

import pytest
from helpers.uses_contract import *  # noqa: F403  the tests that every adapter passes
from helpers.uses_contract import Leaning

from kvcached_patches import vllm
from kvcached_patches.locks import public
from kvcached_patches.options import read_options

pytestmark = [pytest.mark.vllm, pytest.mark.older_release]


@pytest.fixture(scope="module")
def adapter() -> Leaning:
    return Leaning("vllm", vllm.USES)


def test_the_listed_options_are_all_that_the_configuration_has(adapter: Leaning) -> None:
    from vllm import config

    classes = [one for one in vars(config).values() if isinstance(one, type) and is_dataclass(one)]
    had = {f"{one.__name__}.{field.name}" for one in classes for field in fields(one)}
    had = {name for name in had if "._" not in name}
    assert len(had) > 350
    assert had - read_options("vllm")[public(adapter.installed.release)] == set()
