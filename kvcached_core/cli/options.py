"""What several commands of `kvcached` are told in the same way."""

from pathlib import Path
from typing import Annotated

import typer

Directory = Annotated[
    Path,
    typer.Option(
        "--dir",
        envvar="KVCACHED_DIR",
        help="The folder of the ledgers.",
        show_default=False,
        readable=False,  # our own check says more
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")]
