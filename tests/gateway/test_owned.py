"""What the gateway tells an engine nobody else may, in whatever spelling its parser takes."""

import os

import pytest
from helpers.nursery import run_warm
from helpers.spellings import SPELLINGS, check_spellings, spellings

from kvcached_demo.harness.engines import VLLM
from kvcached_gateway.settings.owned import OWNED_ARGS, why_owned, why_owned_variable

VLLM_PARSER = """
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
"""
ENVIRON = {**os.environ, "ENABLE_KVCACHED": "0", "OMP_NUM_THREADS": "1"}


@pytest.mark.vllm
@pytest.mark.skipif(not VLLM.is_installed(), reason="vLLM is not installed")
def test_every_spelling_that_vllm_takes_for_an_owned_argument_is_refused() -> None:
    done = run_warm("vllm", ["-c", VLLM_PARSER + SPELLINGS], ENVIRON)
    check_spellings("vllm", spellings(done))


@pytest.mark.parametrize(
    ("engine", "argument", "full"),
    [
        ("vllm", "--port=1", "--port"),
        ("vllm", "--po", "--port"),
        ("vllm", "--served_model_name", "--served-model-name"),
        ("vllm", "--served_model_na=x", "--served-model-name"),
        ("vllm", "-tp", "-tp"),
        ("vllm", "-tp2", "-tp"),
        ("vllm", "-n2", "-n"),
        ("vllm", "--", "--host"),
        ("sglang", "--tensor-parallel", "--tensor-parallel-size"),
        ("sglang", "--model", "--model"),
        ("sglang", "--kvcached-li", "--kvcached-limit"),
    ],
)
def test_an_owned_argument_is_known_in_its_spellings(engine: str, argument: str, full: str) -> None:
    owned = why_owned(engine, argument)
    assert owned is not None
    assert owned[0] == full


@pytest.mark.parametrize("argument", ["32768", "-1", "x--port", "--max-model-len", "-O3", "-q"])
def test_other_words_are_free(argument: str) -> None:
    assert why_owned("vllm", argument) is None


def test_variables_of_the_gateway_are_owned_and_others_are_free() -> None:
    assert why_owned_variable("KVCACHED_NAME")
    assert why_owned_variable("KVCACHED_PAGE_BYTES") is None


def test_each_reason_says_what_to_do_in_a_clause() -> None:
    for table in OWNED_ARGS.values():
        assert all(reason and not reason.endswith(".") for reason in table.values())
