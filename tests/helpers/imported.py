"""What a file of code imports."""

import ast
from pathlib import Path


def imports(file: Path) -> set[str]:
    """Return the full names of all modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{file}: name the module in full"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found
