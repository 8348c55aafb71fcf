"""One mistake in a file: where, what stands there, what may stand there."""

import difflib
from collections.abc import Iterable

Path = tuple[str | int, ...]  # keys and places in lists, from the top of the file
NOTHING = object()


class Mistake(ValueError):  # noqa: N818  it becomes a ConfigError when its file and line are known
    """A value of a file is wrong.

    Attributes:
        path: Where it stands.
        value: What stands there, or NOTHING where the text says it, or must not.
        text: What is wrong; or, behind a value, what is allowed.
    """

    def __init__(self, path: Path, text: str, value: object = NOTHING) -> None:
        self.path = path
        self.value = value
        self.text = text
        super().__init__(self.sentence())

    def sentence(self) -> str:
        """Return it as a sentence, without the file."""
        if self.value is NOTHING:
            return f"{dotted(self.path)} {self.text}".lstrip()
        return f"{dotted(self.path)}={self.value!r} is not allowed; {self.text}"


def dotted(path: Path) -> str:
    """Return a path as people write it: `models.llama.args[1]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return what is meant by an unknown name, as the end of a sentence."""
    names = list(known)
    found = difflib.get_close_matches(name, names, n=1)
    if found:
        return f"did you mean {found[0]!r}?"
    return f"there are {', '.join(map(repr, names))}" if names else "there are none"
