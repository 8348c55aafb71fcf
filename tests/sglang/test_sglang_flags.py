"""Our flags: what they do is decided when all arguments are known, whatever their order."""

import argparse
import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest

from kvcached_sglang import flags
from kvcached_sglang.startup import startup

pytestmark = pytest.mark.sglang

BANANA = "KVCACHED_LIMIT='banana' is not a size"


@pytest.fixture
def environ() -> Iterator[None]:
    kept = {name: value for name, value in os.environ.items() if "KVCACHED" not in name}
    with patch.dict(os.environ, kept, clear=True), patch.object(startup, "applied", object()):
        yield


def parse(*arguments: str) -> argparse.Namespace:
    """Parse with a parser like SGLang's, our flags behind its own."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--dcp-size", type=int, default=1)
        parser.add_argument("--device", default=None)
        parser.add_argument("--enable-lmcache", action="store_true")

    parser = argparse.ArgumentParser()
    flags.server_args_add_cli_args(staticmethod(add)).__func__(parser)
    return parser.parse_args(arguments)


@pytest.mark.usefixtures("environ")
def test_flags_set_the_variables_of_this_process_and_of_those_that_it_starts() -> None:
    flags.take(parse("--kvcached-limit", "1GiB", "--enable-kvcached", "--kvcached-priority", "3"))
    assert os.environ["ENABLE_KVCACHED"] == "1"
    assert os.environ["KVCACHED_LIMIT"] == "1GiB"
    assert os.environ["KVCACHED_PRIORITY"] == "3"


@pytest.mark.usefixtures("environ")
@pytest.mark.parametrize(("before", "after"), [("0", "1"), ("", "1"), ("auto", "auto")])
def test_the_flag_switches_on_what_the_variable_left_off(before: str, after: str) -> None:
    os.environ["ENABLE_KVCACHED"] = before
    flags.take(parse("--enable-kvcached"))
    assert os.environ["ENABLE_KVCACHED"] == after


@pytest.mark.usefixtures("environ")
@pytest.mark.parametrize(
    ("arguments", "switch", "message"),
    [
        (("--enable-kvcached", "--kvcached-limit", "banana"), None, BANANA),
        (("--kvcached-limit", "banana", "--enable-kvcached"), None, BANANA),
        (("--kvcached-limit", "banana"), "1", BANANA),
        (("--kvcached-limit", "1GiB"), None, "--kvcached-limit would do nothing; add --enable-kv"),
        (("--kvcached-name", "a", "--kvcached-floor", "1GiB"), "0", "--kvcached-floor, --kvcached"),
        (("--enable-kvcached",), "maybe", "ENABLE_KVCACHED='maybe' is not allowed"),
        (("--enable-kvcached", "--dcp-size", "2"), None, "set --dcp-size 1"),
        (("--enable-lmcache",), "1", "remove --enable-lmcache"),
        (("--device", "xpu"), "1", "device xpu: only NVIDIA GPUs and CPUs"),
    ],
)
def test_what_arguments_can_tell_ends_the_start_with_one_message(
    arguments: tuple[str, ...], switch: str | None, message: str
) -> None:
    if switch is not None:
        os.environ["ENABLE_KVCACHED"] = switch
    with pytest.raises(SystemExit) as caught:
        flags.take(parse(*arguments))
    assert str(caught.value).startswith("kvcached: ")
    assert message in str(caught.value)


@pytest.mark.usefixtures("environ")
def test_a_flag_without_the_switch_sets_nothing() -> None:
    with pytest.raises(SystemExit):
        flags.take(parse("--kvcached-limit", "1GiB"))
    assert "KVCACHED_LIMIT" not in os.environ


@pytest.mark.usefixtures("environ")
def test_under_auto_what_cannot_be_served_is_served_unpatched(
    caplog: pytest.LogCaptureFixture,
) -> None:
    os.environ["ENABLE_KVCACHED"] = "auto"
    flags.take(parse("--dcp-size", "2"))
    assert os.environ["ENABLE_KVCACHED"] == "0"
    assert "SGLang serves unpatched" in caplog.text


@pytest.mark.usefixtures("environ")
def test_arguments_are_judged_where_there_is_no_command_line() -> None:
    from kvcached_sglang import start_hooks

    def launch(cls: type, server_args: Any) -> str:
        return f"{cls.__name__} {server_args.dcp_size}"

    os.environ["ENABLE_KVCACHED"] = "1"
    wrapped = start_hooks.launch_subprocesses(classmethod(launch)).__func__
    assert wrapped(int, argparse.Namespace(dcp_size=1)) == "int 1"
    with pytest.raises(SystemExit, match="set --dcp-size 1"):
        wrapped(int, argparse.Namespace(dcp_size=2))
