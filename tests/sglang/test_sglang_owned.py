"""What the gateway tells SGLang nobody else may, in whatever spelling its parser takes."""

import os

import pytest
from helpers.nursery import SGLANG_ENVIRON, run_warm
from helpers.spellings import SPELLINGS, check_spellings, spellings

pytestmark = pytest.mark.sglang
SGLANG_PARSER = """
import argparse
from sglang.srt.server_args import ServerArgs
from kvcached_core.engine.flags import add_flags
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
if "--enable-kvcached" not in parser._option_string_actions:
    add_flags(parser)
"""


def test_every_spelling_that_sglang_takes_for_an_owned_argument_is_refused() -> None:
    environ = {**os.environ, **SGLANG_ENVIRON, "ENABLE_KVCACHED": "0"}
    done = run_warm("sglang", ["-c", SGLANG_PARSER + SPELLINGS], environ)
    check_spellings("sglang", spellings(done))
