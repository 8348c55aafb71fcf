"""Commands in the documents that start SGLang are ones that its command line understands."""

import os

import pytest
from helpers.documents import server_arguments, server_commands
from helpers.nursery import SGLANG_ENVIRON, run_warm

pytestmark = pytest.mark.sglang

PROGRAM = "sglang.launch_server"
PARSE = """
import argparse, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
arguments = parser.parse_args(sys.argv[1:])
print("model", arguments.model_path, "elastic", arguments.enable_kvcached)
"""


@pytest.mark.parametrize("command", server_commands(PROGRAM))
def test_a_documented_server_command_is_parsed_by_sglang(command: str) -> None:
    kept = {name: value for name, value in os.environ.items() if "KVCACHED" not in name}
    environ = kept | SGLANG_ENVIRON
    done = run_warm("sglang", ["-c", PARSE, *server_arguments(command, PROGRAM)], environ)
    assert done.returncode == 0, done.stderr
    assert "model MODEL elastic True" in done.stdout
