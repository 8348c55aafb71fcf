"""What stands in for an engine's method takes its arguments, and drops none."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.planted import adapter_folder
from helpers.uses import Adapter, Function

from kvcached_patches.engines import DISTRIBUTIONS
from kvcached_patches.hook import OVERRIDE, Hook
from kvcached_patches.locks import locked_releases, read_lock
from kvcached_patches.sources import Folder

NOWHERE = Folder(Path("/nowhere"))
ADAPTERS = {
    package: Adapter(adapter_folder(package), package, NOWHERE) for package in ("vllm", "sglang")
}


def ours_of(adapter: Adapter, hook: Hook, target: str) -> tuple[Path, Function] | None:
    return adapter.replacement(hook) if hook.replacement else adapter.override(target)


def parameters(arguments: ast.arguments) -> list[str]:
    return [one.arg for one in (*arguments.posonlyargs, *arguments.args)]


def not_taken(ours: ast.arguments, theirs: ast.arguments) -> Iterator[str]:
    """Yield what a call may have that fits the engine's method and not ours."""
    mine, needed = parameters(ours), parameters(theirs)
    for index, name in enumerate(needed):
        if index < len(mine) and mine[index] != name:
            yield f"{mine[index]} stands where the engine has {name}"
        if index >= len(mine) and ours.vararg is None:
            yield f"no place for {name}"
        if name not in mine and ours.kwarg is None and index > 0:
            yield f"{name} by name"
    for one in theirs.kwonlyargs:
        if ours.kwarg is None and one.arg not in [*mine, *(own.arg for own in ours.kwonlyargs)]:
            yield one.arg
    extra = mine[len(needed) :] if theirs.vararg is None else []
    if len(extra) > len(ours.defaults):
        yield f"{extra[0]} is asked for, and the engine has none"
    if theirs.kwarg is not None and ours.kwarg is None:
        yield f"**{theirs.kwarg.arg}"


def not_passed_on(ours: Function) -> Iterator[str]:
    """Yield the parameters that nothing in the body reads, or passes on as they came."""
    starred, loaded = set(), set()
    for node in ast.walk(ours):
        if isinstance(node, ast.Starred) and isinstance(node.value, ast.Name):
            starred.add(node.value.id)
        if isinstance(node, ast.keyword) and node.arg is None and isinstance(node.value, ast.Name):
            starred.add(node.value.id)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            loaded.add(node.id)
    for rest in (ours.args.vararg, ours.args.kwarg):
        if rest is not None and rest.arg not in starred:
            yield f"*{rest.arg}"
    for one in (*ours.args.args[1:], *ours.args.kwonlyargs):
        if one.arg not in loaded:
            yield one.arg


@pytest.mark.parametrize(
    "distribution", [name for name, one in DISTRIBUTIONS.items() if one.package in ADAPTERS]
)
def test_our_methods_take_what_those_of_each_locked_release_take(distribution: str) -> None:
    engine = DISTRIBUTIONS[distribution]
    problems = set()
    num_compared = 0
    for release in locked_releases(distribution):
        lock = read_lock(distribution, release)
        assert lock is not None
        for hook in engine.locked:
            for target in (hook.target, *hook.alternatives):
                signature = lock.symbols[target].signature if target in lock.symbols else ""
                found = ours_of(ADAPTERS[engine.package], hook, target)
                # A name that we rebind has no signature; one of ours that builds takes more.
                if not signature.startswith("(") or found is None or hook.path[-1] == "__init__":
                    continue
                theirs = ast.parse(f"def theirs{signature}: ...").body[0]
                assert isinstance(theirs, ast.FunctionDef)
                num_compared += 1
                path, ours = found
                for problem in not_taken(ours.args, theirs.args):
                    problems.add(f"{path.name}:{ours.lineno} {target} of {release}: {problem}")
    assert num_compared > len(locked_releases(distribution))
    assert not problems, "\n".join(sorted(problems))


@pytest.mark.parametrize("package", ADAPTERS)
def test_our_methods_drop_no_argument(package: str) -> None:
    distribution = next(name for name, one in DISTRIBUTIONS.items() if one.package == package)
    dropped = set()
    num_read = 0
    for hook in DISTRIBUTIONS[distribution].locked:
        if not hook.replacement and hook.how != OVERRIDE:
            continue
        found = ours_of(ADAPTERS[package], hook, hook.target)
        if found is not None:
            num_read += 1
            path, ours = found
            dropped |= {f"{path.name}:{ours.lineno} {what}" for what in not_passed_on(ours)}
    assert num_read
    assert not dropped, "\n".join(sorted(dropped))


@pytest.mark.parametrize(
    "hook", [h for e in DISTRIBUTIONS.values() for h in e.locked if h.replacement]
)
def test_the_function_of_every_hook_is_found(hook: Hook) -> None:
    package = hook.module.split(".")[0]
    assert ADAPTERS[package].replacement(hook) is not None
