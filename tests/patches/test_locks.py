"""A lock says what a release is; a planted drift is refused with the right finding."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from kvcached_patches import Hook, locks, sglang, vllm
from kvcached_patches.aliases import aliases
from kvcached_patches.check import choose_targets, describe_hooks
from kvcached_patches.engines import DISTRIBUTIONS, ENGINES
from kvcached_patches.hook import OVERRIDE, REBIND, USE, WRAP, uses
from kvcached_patches.locks import Lock, check_lock, examine, gone_since, locked_hooks
from kvcached_patches.sources import Folder, Sources, Wheel
from kvcached_patches.symbols import Symbol
from kvcached_patches.unchanged import describe_files

CORE = """
from engine.parts import Part

class Owner:
    @traced(span="x")
    def method(self, request, tokens=1):
        # what it does
        return tokens

    def swapped(self):
        return 1
"""
USER = "from engine.parts import Part as P\n"
HOOKS = (
    Hook("engine.core:Owner.method", "x:y", "why", ("tokens",)),
    Hook("engine.core:Owner.swapped", "x:y", "why", how=OVERRIDE),
    Hook("engine.core:Part", "x:y", "why", how=REBIND, adr=1),
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(locks, "FOLDER", tmp_path / "locks")
    return tmp_path / "locks"


def engine(root: Path, core: str = CORE) -> Folder:
    package = root / "site" / "engine"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    (package / "parts.py").write_text("class Part:\n    pass\n")
    (package / "core.py").write_text(core)
    (package / "user.py").write_text(USER)
    return Folder(root / "site")


def lock(sources: Sources, release: str = "1.0.0") -> Lock:
    chosen = choose_targets(HOOKS, sources)
    files = describe_files(HOOKS, sources)
    made = Lock("engine", release, "", describe_hooks(chosen, sources), files)
    made.write()
    return made


def findings(root: Path, core: str, release: str = "1.0.0") -> list[str]:
    return [str(found) for found in examine(HOOKS, "engine", release, engine(root, core))]


def test_a_release_that_is_what_its_lock_says_fits(tmp_path: Path) -> None:
    made = lock(engine(tmp_path))
    assert findings(tmp_path, CORE) == []
    assert check_lock(made, HOOKS, engine(tmp_path)) == []
    assert findings(tmp_path, CORE, "1.0.0+cpu") == []


def test_comments_and_blank_lines_are_no_drift(tmp_path: Path) -> None:
    made = lock(engine(tmp_path))
    changed = CORE.replace("# what it does", "# what else it does\n")
    assert findings(tmp_path, changed) == []
    (found,) = check_lock(made, HOOKS, engine(tmp_path, changed))
    assert str(found) == "engine.core: the lock has another file; lock again"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("tokens=1", "num_tokens=1", "it has no parameter tokens"),
        ("request, tokens", "request, extra, tokens", "it is @traced"),
        ('@traced(span="x")', "@cached", "it is @cached"),
        ("class Owner", "class Other", "Owner is not defined there"),
        ("from engine.parts", "from engine.moved", "it is from engine.moved import Part"),
        ("return 1", "return 2", "its body is not the locked one"),
    ],
)
def test_planted_drift_is_refused_with_its_finding(
    tmp_path: Path, old: str, new: str, problem: str
) -> None:
    lock(engine(tmp_path))
    found = findings(tmp_path, CORE.replace(old, new))
    assert found
    assert all(problem in text for text in found)


def test_a_body_that_still_runs_inside_ours_may_change_but_not_unseen(tmp_path: Path) -> None:
    made = lock(engine(tmp_path))
    changed = CORE.replace("return tokens", "return tokens + 1")
    assert findings(tmp_path, changed) == []
    found, another = check_lock(made, HOOKS, engine(tmp_path, changed))
    assert str(found) == "engine.core:Owner.method: its body is not the locked one"
    assert str(another) == "engine.core: the lock has another file; lock again"


LEANED_ON = (
    *uses("we call it", "engine.core:Owner.method", "engine.core:Owner.attribute"),
    *uses("a subclass of ours stands in", "engine.core:Owner.swapped", how=OVERRIDE),
)
WITH_ATTRIBUTE = CORE + "\n    def __init__(self):\n        self.attribute: int = 1\n"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "", None),
        ("return tokens", "return tokens + 1", None),  # what we call may do it in another way
        ("tokens=1", "tokens=1, more=2", "engine.core:Owner.method: it is @traced"),
        ("return 1", "return 2", "engine.core:Owner.swapped: its body is not the locked one"),
        ("self.attribute:", "self.renamed:", "engine.core:Owner.attribute: attribute is not"),
    ],
)
def test_what_we_lean_on_beside_the_hooks_is_locked_too(
    tmp_path: Path, old: str, new: str, expected: str | None
) -> None:
    sources = engine(tmp_path, WITH_ATTRIBUTE)
    Lock("engine", "1.0.0", "", describe_hooks(LEANED_ON, sources)).write()
    changed = engine(tmp_path, WITH_ATTRIBUTE.replace(old, new))
    found = [str(one) for one in examine(LEANED_ON, "engine", "1.0.0", changed)]
    assert [text.startswith(expected or "") for text in found] == ([True] if expected else [])


SOME_HAVE_IT = uses("our code looks", "engine.core:Owner.attribute", is_optional=True)


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (CORE, CORE, None),
        (WITH_ATTRIBUTE, WITH_ATTRIBUTE, None),
        (CORE, WITH_ATTRIBUTE, "the lock does not have it; lock again"),
        (WITH_ATTRIBUTE, CORE, "it is not there"),
    ],
)
def test_what_only_some_releases_have_is_there_or_not_as_the_lock_says(
    tmp_path: Path, before: str, after: str, problem: str | None
) -> None:
    Lock("engine", "1.0.0", "", describe_hooks(SOME_HAVE_IT, engine(tmp_path, before))).write()
    found = examine(SOME_HAVE_IT, "engine", "1.0.0", engine(tmp_path, after))
    assert [one.problem for one in found] == ([problem] if problem else [])


def test_what_a_new_release_lacks_and_the_one_before_has_is_told_to_who_locks_it(
    tmp_path: Path,
) -> None:
    before = describe_hooks(SOME_HAVE_IT, engine(tmp_path, WITH_ATTRIBUTE))
    Lock("engine", "1.0.0", "", before).write()
    assert gone_since(SOME_HAVE_IT, "engine", "1.1.0", before) == []
    (found,) = gone_since(SOME_HAVE_IT, "engine", "1.1.0", ())
    assert str(found) == (
        "engine.core:Owner.attribute: it is gone, and 1.0.0 has it; was it renamed?"
    )
    assert gone_since(LEANED_ON, "engine", "1.1.0", ()) == []


def test_what_we_lean_on_is_never_given_to_the_patcher() -> None:
    for hooks, leaned_on in ((vllm.HOOKS, vllm.USES), (sglang.ALL_HOOKS, sglang.USES)):
        assert all(hook.replacement for hook in hooks)
        assert not any(hook.replacement for hook in leaned_on)


def test_versions_are_sorted_as_python_packages_are() -> None:
    ordered = ["nonsense", "0.9.0", "0.10.0.dev3", "0.10.0rc1", "0.10.0", "0.10.0.post1", "0.10.1"]
    mixed = [ordered[index] for index in (4, 2, 6, 0, 5, 3, 1)]
    assert sorted(mixed, key=locks.order) == ordered
    assert locks.order("0.10.0+cu130") == locks.order("0.10.0")


def test_a_lock_reads_as_it_was_written_a_line_for_each_symbol(tmp_path: Path) -> None:
    made = lock(engine(tmp_path))
    assert locks.read_lock("engine", "1.0.0+cpu") == made
    assert sum("engine.core:" in line for line in made.path.read_text().splitlines()) == len(HOOKS)


def test_a_release_without_a_lock_is_refused_with_the_nearest(tmp_path: Path) -> None:
    sources = engine(tmp_path)
    for release in ("1.0.0", "1.0.0.post1", "1.2.0"):
        lock(sources, release)
    assert findings(tmp_path, CORE, "1.1.0") == [
        "engine 1.1.0: no lock; the nearest is that of 1.0.0.post1"
    ]
    assert findings(tmp_path, CORE, "0.9.0")[0].endswith("the nearest is that of 1.0.0")


def test_a_wheel_reads_as_the_folder_does(tmp_path: Path) -> None:
    sources = engine(tmp_path)
    with zipfile.ZipFile(tmp_path / "engine.whl", "w") as wheel:
        for file in sources.root.rglob("*.py"):
            wheel.write(file, file.relative_to(sources.root))
    packed = Wheel(tmp_path / "engine.whl")
    assert describe_hooks(HOOKS, packed) == describe_hooks(HOOKS, sources)
    assert set(packed.modules("engine")) == set(sources.modules("engine"))


def test_a_lock_holds_no_line_of_the_engine(tmp_path: Path) -> None:
    text = lock(engine(tmp_path)).path.read_text()
    assert "return" not in text
    assert "# what it does" not in text


def test_who_else_has_a_rebound_name_is_found(tmp_path: Path) -> None:
    assert aliases(HOOKS, engine(tmp_path), "engine") == {"engine.core:Part": ["engine.user"]}


def test_a_locked_hook_knows_its_target_and_the_engines_own_decorators(tmp_path: Path) -> None:
    made = lock(engine(tmp_path))
    moved = Hook("engine.new:method", "x:y", "why", (), ("engine.core:Owner.method",))
    (chosen,) = locked_hooks([moved], made)
    assert (chosen.target, chosen.num_decorators) == ("engine.core:Owner.method", 1)


def test_a_hook_that_a_release_may_lack_is_not_applied_where_it_lacks_it(tmp_path: Path) -> None:
    made = lock(engine(tmp_path))
    lacking = Hook("engine.core:Owner.lacking", "x:y", "why", is_optional=True)
    assert locked_hooks([lacking], made) == ()
    assert len(locked_hooks([replace(lacking, is_optional=False)], made)) == 1


def test_everything_below_a_wrapped_method_has_a_decision_record() -> None:
    records = Path(__file__).parents[2] / "docs" / "adr"
    for served in ENGINES.values():
        for hook in served.locked:
            assert hook.how in (WRAP, USE, OVERRIDE) or list(records.glob(f"{hook.adr:04}-*.md")), (
                hook.target
            )


def test_each_lock_in_the_package_is_of_a_package_that_we_serve() -> None:
    kept = Path(locks.__file__).parent / "locks"
    found = [json.loads(path.read_text()) for path in kept.glob("*.json")]
    assert {one["distribution"] for one in found} == set(DISTRIBUTIONS)
    for one in found:
        symbols = {target: Symbol("") for target in one["symbols"]}
        made = Lock(one["distribution"], one["release"], symbols=symbols)
        chosen = locked_hooks(DISTRIBUTIONS[made.distribution].locked, made)
        assert {hook.target for hook in chosen if not hook.is_optional} <= symbols.keys()
        assert symbols.keys() <= {hook.target for hook in chosen}
        assert len({hook.target for hook in chosen}) == len(chosen)
