"""What a hook is, and what else of an engine we lean on."""

from dataclasses import dataclass

WRAP, REBIND = "wrap", "rebind"
# Not hooked, but locked: a symbol that we call or read, and a method that a subclass overrides.
USE, OVERRIDE = "use", "override"


class HookError(RuntimeError):
    """A hook cannot be applied or reverted; nothing was left half done."""


@dataclass(frozen=True)
class Hook:
    """One symbol of an engine that we replace.

    Attributes:
        target: `module:name` or `module:Class.method`, where the engine defines it.
        replacement: `module:function` of ours. It gets the original and returns what takes its
            place; it is imported when the hook is applied.
        why: One line.
        parameters: Names that the target's signature must have: those the replacement relies on.
        alternatives: Where other releases define the same thing, in other modules or by other
            names; the first that is there is hooked.
        how: `WRAP` a method or function where it is defined, the original runs inside; `REBIND` a
            name that a module imported. With
            `USE` nothing is replaced, and the signature must be the locked one; with `OVERRIDE` a
            subclass of ours stands in for it, and the body must be the locked one.
        adr: The decision record, for everything but `WRAP`.
        num_decorators: Decorators of the engine's own on the target; from its lock.
        is_optional: Whether there are releases without it; our code looks. A lock says which.
    """

    target: str
    replacement: str
    why: str
    parameters: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    how: str = WRAP
    adr: int | None = None
    num_decorators: int = 0
    is_optional: bool = False

    @property
    def module(self) -> str:
        """The engine module that holds the target."""
        return module_of(self.target)

    @property
    def path(self) -> list[str]:
        """The names that lead from the module to the target."""
        return self.target.partition(":")[2].split(".")


def module_of(target: str) -> str:
    """Return the module of a target."""
    return target.partition(":")[0]


def candidates(hook: Hook) -> tuple[str, ...]:
    """Return the targets of a hook, of which the first that is there counts."""
    return hook.target, *hook.alternatives


def members(owner: str, *names: str) -> tuple[str, ...]:
    """Return targets inside a class, for `uses`; each of `names` is one or more, with spaces."""
    return tuple(f"{owner}.{name}" for line in names for name in line.split())


def uses(why: str, *targets: str, how: str = USE, is_optional: bool = False) -> tuple[Hook, ...]:
    """Return what we lean on beside the hooks, for the locks; nothing of it is replaced."""
    return tuple(Hook(target, "", why, how=how, is_optional=is_optional) for target in targets)


@dataclass(frozen=True)
class Finding:
    """Why a hook does not fit an engine."""

    target: str
    problem: str

    def __str__(self) -> str:
        return f"{self.target}: {self.problem}"
