"""Whether hooks fit an engine, from its source files alone: nothing of the engine is imported."""

from collections.abc import Iterable
from dataclasses import replace

from kvcached_patches.hook import OVERRIDE, Finding, Hook, candidates
from kvcached_patches.sources import Sources
from kvcached_patches.symbols import Symbol, describe, find, parameters_of


def choose_targets(hooks: Iterable[Hook], sources: Sources) -> tuple[Hook, ...]:
    """Return `hooks`, each with the first of its targets that is there."""
    return tuple(_chosen(hook, sources) for hook in hooks)


def check_hooks(hooks: Iterable[Hook], sources: Sources) -> list[Finding]:
    """Return why `hooks` do not fit the engine."""
    found = ((hook.target, _problem(hook, sources)) for hook in hooks)
    return [Finding(target, problem) for target, problem in found if problem]


def describe_hooks(hooks: Iterable[Hook], sources: Sources) -> dict[str, Symbol]:
    """Return what is known of each target, for a lock; those that are missing are left out."""
    found = {}
    for hook in hooks:
        source, tree = sources.read(hook.module), sources.tree(hook.module)
        node = None if tree is None else find(tree, hook.path)
        if source is not None and node is not None and not isinstance(node, str):
            found[hook.target] = describe(node, hook.path[-1], source)
    return found


def compare(
    hooks: Iterable[Hook], locked: dict[str, Symbol], found: dict[str, Symbol], *, exactly: bool
) -> list[Finding]:
    """Return where targets differ from what a lock says of them.

    Args:
        hooks: The hooks.
        locked: What the lock says.
        found: What is there.
        exactly: Whether a changed body is a finding also where the original runs, as it does in
            everything that is not overridden.
    """
    findings = []
    for hook in hooks:
        was, now = locked.get(hook.target), found.get(hook.target)
        if was is None and now is None and hook.is_optional:
            continue
        if now is None:
            findings.append(Finding(hook.target, "it is not there"))
        elif was is None:
            findings.append(Finding(hook.target, "the lock does not have it; lock again"))
        elif (was.signature, was.decorators) != (now.signature, now.decorators):
            text = f"it is {_text(now)}, the lock has {_text(was)}"
            findings.append(Finding(hook.target, text))
        elif was.body != now.body and (exactly or hook.how == OVERRIDE):
            findings.append(Finding(hook.target, "its body is not the locked one"))
    return findings


def _text(symbol: Symbol) -> str:
    return " ".join([*(f"@{decorator}" for decorator in symbol.decorators), symbol.signature])


def _chosen(hook: Hook, sources: Sources) -> Hook:
    for target in candidates(hook):
        candidate = replace(hook, target=target, alternatives=())
        tree = sources.tree(candidate.module)
        if tree is not None and not isinstance(find(tree, candidate.path), str):
            return candidate
    return replace(hook, alternatives=())


def _problem(hook: Hook, sources: Sources) -> str | None:
    tree = sources.tree(hook.module)
    if tree is None:
        return None if hook.is_optional else "the module is gone"
    node = find(tree, hook.path)
    if isinstance(node, str):
        return None if hook.is_optional else f"{node} is not defined there"
    if not hook.parameters:
        return None
    present = parameters_of(node)
    if present is None:
        return "it is not a function"
    missing = [name for name in hook.parameters if name not in present]
    return f"it has no parameter {', '.join(missing)}" if missing else None
