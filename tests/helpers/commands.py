"""What `kvcached` says when it is called in this process."""

from typer.testing import CliRunner

from kvcached_core.cli.app import app


def said(*arguments: str) -> str:
    """Return what a command says; fail if it does not end well."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output
