"""What every adapter leans on is in the table of its engine, and a change of it is refused.

A module that imports these tests has an `adapter` fixture, which returns a `Leaning`.
"""

import pytest

from helpers.planted import adapter_folder, what_a_planted_change_finds
from helpers.uses import Adapter, Table
from kvcached_patches import ENGINES, Hook
from kvcached_patches.hook import USE
from kvcached_patches.locks import public
from kvcached_patches.options import options_in, read_options
from kvcached_patches.policy import hooks_of, report
from kvcached_patches.sources import Folder


class Leaning:
    """An adapter, and the release of its engine that is installed here.

    Args:
        package: What the engine is imported as.
        uses: What the table says that the adapter leans on.
    """

    def __init__(self, package: str, uses: tuple[Hook, ...]) -> None:
        self.engine, self.uses = ENGINES[package], uses
        installed = self.engine.installed()
        assert installed is not None
        self.installed = installed
        self.locked = hooks_of(installed, self.engine.locked)
        self.source = Adapter(adapter_folder(package), package, Folder(installed.root))


def test_everything_that_the_adapter_leans_on_is_in_the_table(adapter: Leaning) -> None:
    uses = list(adapter.source.uses(adapter.locked))
    assert uses
    missing = Table(adapter.engine.locked).missing(uses)
    assert not missing, "\n".join(missing)


def test_nothing_is_in_the_table_that_the_adapter_does_not_name(adapter: Leaning) -> None:
    words = adapter.source.words()
    assert not [one.target for one in adapter.uses if one.how == USE and one.path[-1] not in words]


def test_the_options_of_this_release_are_those_that_are_listed(adapter: Leaning) -> None:
    engine, installed = adapter.engine, adapter.installed
    assert engine.options is not None
    found = options_in(Folder(installed.root), engine.options)
    listed = read_options(engine.package)[public(installed.release)]
    assert found == listed, (
        f"new: {sorted(found - listed)}, gone: {sorted(listed - found)}; read them, then run "
        f"python -m kvcached_patches relock {installed.distribution}=={public(installed.release)}"
    )


PROBLEMS = {
    "body": ("its body is not the locked one",),
    "signature": ("planted", "it has no parameter"),
    "attribute": ("is not defined there", "it is not there"),
}


KINDS = [
    "body",
    pytest.param("signature", marks=pytest.mark.every_release),
    pytest.param("attribute", marks=pytest.mark.every_release),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_planted_in_what_we_lean_on_is_refused_and_named(
    adapter: Leaning, kind: str
) -> None:
    found = what_a_planted_change_finds(adapter.locked, adapter.installed, kind)
    assert found
    for target, findings in found.items():
        assert len(findings) == 1, target
        assert any(text in findings[0].problem for text in PROBLEMS[kind])
    every = [one for findings in found.values() for one in findings]
    text = report(adapter.engine.title, adapter.installed, every)
    assert all(f"\n  - {target}: " in text for target in found)
    assert text.endswith("or set ENABLE_KVCACHED=auto or 0")
