"""Commands that documents show, as they are written there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The ways to use the gateway, and its own folder.
WAYS = sorted(path.parent / "README.md" for path in (ROOT / "examples").glob("*/cpu.yaml"))
DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "docs/index.md", "docs/operations.md", "docs/gateway.md"),
    *(path.relative_to(ROOT).as_posix() for path in WAYS),
)
INDENT = "    "
OF_A_FILE = re.compile(r"^[\w-]+:(?: [^/]|$)")  # how a block begins that is a file
COMMENT = re.compile(r"\s+#\s.*$")


def blocks(document: Path) -> list[list[str]]:
    """Return the lines of each indented block of a document, without the indentation."""
    found: list[list[str]] = []
    before = ""
    for line in document.read_text().splitlines():
        if line.startswith(INDENT) and (before.startswith(INDENT) or not before.strip()):
            if not before.startswith(INDENT):
                found.append([])
            found[-1].append(line.removeprefix(INDENT))
        before = line
    return found


def commands() -> list[str]:
    """Return each line of each block of all documents once, without its comment."""
    lines = (
        COMMENT.sub("", line)
        for name in DOCUMENTS
        for block in blocks(ROOT / name)
        if not OF_A_FILE.match(block[0])
        for line in block
    )
    return list(dict.fromkeys(lines))


def server_commands(program: str) -> list[str]:
    """Return the commands that start servers with a program."""
    return [command for command in commands() if program in command]


def server_arguments(command: str, program: str) -> list[str]:
    """Return the arguments that a server's command gives to its program."""
    return command.split(program)[1].removesuffix("&").split()
