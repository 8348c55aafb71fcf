"""Commands in the documents that start vLLM are ones that vLLM's command line understands."""

import os

import pytest
from helpers.documents import server_arguments, server_commands
from helpers.nursery import run_warm

pytestmark = pytest.mark.vllm

PROGRAM = "vllm serve"
PARSE = """
import sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
ServeSubcommand().subparser_init(parser.add_subparsers())
print("model", parser.parse_args(["serve", *sys.argv[1:]]).model_tag)
"""


@pytest.mark.parametrize("command", server_commands(PROGRAM))
def test_a_documented_server_command_is_parsed_by_vllm(command: str) -> None:
    arguments = server_arguments(command, PROGRAM)
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = run_warm("vllm", ["-c", PARSE, *arguments], environ)
    assert done.returncode == 0, done.stderr
    assert f"model {arguments[0]}" in done.stdout
