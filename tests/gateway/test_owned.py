"""What the gateway tells an engine nobody else may, in whatever spelling its parser takes."""

import json
import os
import subprocess

import pytest

from kvcached_demo.harness.engines import SGLANG, VLLM
from kvcached_gateway.settings.owned import OWNED_ARGS, why_owned, why_owned_variable

# Prints each word of a command line that a parser reads as one of its options, by the option's
# names: every option in full, and every beginning of it that the parser takes for it.
SPELLINGS = """
import json
found = {}
for action in parser._actions:
    for option in action.option_strings:
        for length in range(2, len(option) + 1):
            word = option[:length]
            try:
                (match,) = [parser._option_string_actions[word]] if (
                    word in parser._option_string_actions
                ) else [one[0] for one in parser._get_option_tuples(word)]
            except ValueError:
                continue
            found[word] = match.option_strings
print("\\n" + json.dumps(found))
"""
VLLM_PARSER = """
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
"""
SGLANG_PARSER = """
import argparse
from sglang.srt.server_args import ServerArgs
from kvcached_core.engine.flags import add_flags
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
if "--enable-kvcached" not in parser._option_string_actions:
    add_flags(parser)
"""


def spellings(python: str, parser: str) -> dict[str, list[str]]:
    done = subprocess.run(
        [python, "-c", parser + SPELLINGS],
        env={**os.environ, "ENABLE_KVCACHED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_spellings(engine: str, found: dict[str, list[str]]) -> None:
    owned = OWNED_ARGS[engine]
    assert len(found) > 1000
    missed = [
        word
        for word, options in found.items()
        if set(options) & set(owned) and why_owned(engine, word) is None
    ]
    assert missed == []
    too_much = [
        word
        for word, options in found.items()
        if word in options and not set(options) & set(owned) and why_owned(engine, word)
    ]
    assert too_much == []


@pytest.mark.vllm
@pytest.mark.skipif(not VLLM.is_installed(), reason="vLLM is not installed")
def test_every_spelling_that_vllm_takes_for_an_owned_argument_is_refused() -> None:
    check_spellings("vllm", spellings(VLLM.python, VLLM_PARSER))


@pytest.mark.sglang
@pytest.mark.skipif(not SGLANG.is_installed(), reason="SGLang is not installed")
def test_every_spelling_that_sglang_takes_for_an_owned_argument_is_refused() -> None:
    check_spellings("sglang", spellings(SGLANG.python, SGLANG_PARSER))


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
