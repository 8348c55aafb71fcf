"""What a hook is."""

from dataclasses import dataclass


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
        alternatives: Where other releases define the same thing, in other modules.
    """

    target: str
    replacement: str
    why: str
    parameters: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The engine module that holds the target."""
        return self.target.partition(":")[0]

    @property
    def path(self) -> list[str]:
        """The names that lead from the module to the target."""
        return self.target.partition(":")[2].split(".")


@dataclass(frozen=True)
class Finding:
    """Why a hook does not fit an engine."""

    target: str
    problem: str

    def __str__(self) -> str:
        return f"{self.target}: {self.problem}"
