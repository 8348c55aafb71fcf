"""What a benchmark of the benchmarks' folder records, run as a program of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def recorded_by(script: str, folder: Path, *words: str) -> Any:
    """Run a script with these arguments, and return its record, which goes to a folder."""
    path = folder / "found.json"
    command = [sys.executable, str(BENCHMARKS / script), "--json", str(path), *words]
    subprocess.run(command, env=os.environ, check=True, capture_output=True)
    return json.loads(path.read_text())
