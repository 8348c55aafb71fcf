"""What we lean on in SGLang is in the table, and what a patched build changes of it is refused."""

import pytest
from helpers.planted import adapter_folder, what_a_planted_change_finds
from helpers.uses import Adapter, Table

from kvcached_patches import ENGINES, sglang
from kvcached_patches.hook import USE
from kvcached_patches.policy import hooks_of, report
from kvcached_patches.sources import Folder
from kvcached_sglang.obstacles import OBSTACLES, WEIGHT_OBSTACLES
from kvcached_sglang.weight_hooks import ANSWERS

pytestmark = pytest.mark.sglang

ENGINE = ENGINES["sglang"]
INSTALLED = ENGINE.installed()
assert INSTALLED is not None
LOCKED = hooks_of(INSTALLED, ENGINE.locked)
ADAPTER = Adapter(adapter_folder("sglang"), "sglang", Folder(INSTALLED.root))


def test_everything_that_the_adapter_leans_on_is_in_the_table() -> None:
    uses = list(ADAPTER.uses(LOCKED))
    assert uses
    missing = Table(ENGINE.locked).missing(uses)
    assert not missing, "\n".join(missing)


def test_nothing_is_in_the_table_that_the_adapter_does_not_name() -> None:
    words = ADAPTER.words()
    assert not [
        hook.target for hook in sglang.USES if hook.how == USE and hook.path[-1] not in words
    ]


PROBLEMS = {
    "body": ("its body is not the locked one",),
    "signature": ("planted", "it has no parameter"),
    "attribute": ("is not defined there", "it is not there"),
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_change_planted_in_what_we_lean_on_is_refused_and_named(kind: str) -> None:
    found = what_a_planted_change_finds(LOCKED, INSTALLED, kind)
    assert found
    for target, findings in found.items():
        assert len(findings) == 1, target
        assert any(text in findings[0].problem for text in PROBLEMS[kind])
    text = report("SGLang", INSTALLED, [one for findings in found.values() for one in findings])
    assert all(f"\n  - {target}: " in text for target in found)
    assert text.endswith("or set ENABLE_KVCACHED=auto or 0")


def test_every_argument_that_is_refused_is_in_the_table() -> None:
    names = {hook.path[-1] for hook in sglang.USES}
    assert names.issuperset(OBSTACLES | WEIGHT_OBSTACLES)


def test_every_answer_to_a_refused_call_is_in_the_table() -> None:
    targets = {hook.target for hook in sglang.USES}
    answers = {f"sglang.srt.managers.io_struct:{name}" for name in ANSWERS.values()}
    assert not {answer for answer in answers if not any(one.startswith(answer) for one in targets)}
