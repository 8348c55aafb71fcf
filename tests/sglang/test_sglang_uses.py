"""What we lean on in SGLang is in the table, and what a patched build changes of it is refused."""

from inspect import signature

import pytest
from helpers.uses_contract import *  # noqa: F403  the tests that every adapter passes
from helpers.uses_contract import Leaning

from kvcached_patches import sglang
from kvcached_patches.options import read_options
from kvcached_sglang.obstacles import OBSTACLES, WEIGHT_OBSTACLES
from kvcached_sglang.weight_hooks import ANSWERS

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def adapter() -> Leaning:
    return Leaning("sglang", sglang.USES)


def test_every_argument_that_is_refused_is_in_the_table() -> None:
    names = {hook.path[-1] for hook in sglang.USES}
    assert names.issuperset(OBSTACLES | WEIGHT_OBSTACLES)


def test_every_answer_to_a_refused_call_is_in_the_table() -> None:
    targets = {hook.target for hook in sglang.USES}
    answers = {f"sglang.srt.managers.io_struct:{name}" for name in ANSWERS.values()}
    assert not {answer for answer in answers if not any(one.startswith(answer) for one in targets)}


def test_the_listed_options_are_all_that_a_server_takes(adapter: Leaning) -> None:
    from sglang.srt.server_args import ServerArgs

    taken = {name for name in signature(ServerArgs).parameters if not name.startswith("_")}
    assert taken == read_options("sglang")[adapter.installed.release]
