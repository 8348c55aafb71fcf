"""The file of models: what it says is read as it is written, and each mistake is one error."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_core.errors import ConfigError
from kvcached_core.units import GIB, MIB
from kvcached_gateway.settings.config import Settings
from kvcached_gateway.settings.config_checks import FIELD_KEYS
from kvcached_gateway.settings.config_file import DEFAULT_KEYS, read_settings

FULL = """
listen: 0.0.0.0:9000
keys_file: keys.yaml
workers: 4
devices: [0, GPU-6f1c]
host_memory: 192GiB
turn: 1m
engines_on_exit: keep
max_body: 8MiB
environments:
  vllm:
    engine: vllm
    python: venv/bin/python
    env: {HF_TOKEN: "${TOKEN}", OMP_NUM_THREADS: 4}
    args: [--seed, 1]
  sglang: {engine: sglang, python: /opt/sglang/bin/python}
classes:
  chat: {ttft: 1s, tpot: 50ms, weight: 2}
  batch: {late: refuse}
memory: {idle_before_eviction: 1m}
placement: {move_gain: 0.5}
defaults:
  environment: vllm
  max_wait: 2m
  kv: {floor: 1GiB, priority: 3}
  when_idle: stop
models:
  llama:
    model: ./llama
    revision: 0123
    aliases: [gpt-4o, "4"]
    args: [--max-model-len, 32768]
    class: chat
    pin: yes
    kv: {limit: 60%, priority: 7}
    nodes: [gpu=H100, ray.io/market-type=spot]
    warm_at: [mon-fri 07:50 Europe/Berlin]
  qwen: {model: Qwen/Qwen3-32B, tensor_parallel: 2, idle_limit: 30m, max_wait: 5s}
  guard:
    {environment: sglang, model: /models/guard, devices: GPU-6f1c, warm_with: [llama], nodes: spare}
  fine: {adapter_of: llama, path: ../adapters/fine, max_queue: 7}
  remote: {url: "http://10.0.0.7:8000", key_env: TOKEN}
"""
TWO = """
environments:
  vllm: {engine: vllm, python: /p}
  sglang: {engine: sglang, python: /p}
models:
  one: {model: m, environment: vllm}
  two: {model: m, environment: vllm}
"""
Read = Callable[[str], Settings]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(text: str) -> Settings:
        path = tmp_path / "models.yaml"
        path.write_text(text)
        path.chmod(0o644)
        return read_settings(path, {"TOKEN": "hush"})

    return read


def test_each_value_is_read_as_it_is_meant(read: Read, tmp_path: Path) -> None:
    found = read(FULL)
    assert (found.host, found.port, found.workers) == ("0.0.0.0", 9000, 4)  # noqa: S104  a file's
    assert found.keys_file == tmp_path / "keys.yaml"
    assert found.devices == ("0", "GPU-6f1c")
    assert (found.host_memory_bytes, found.max_body_bytes) == (192 * GIB, 8 * MIB)
    vllm = found.environments["vllm"]
    assert vllm.python == tmp_path / "venv" / "bin" / "python"
    assert vllm.env == {"HF_TOKEN": "hush", "OMP_NUM_THREADS": "4"}
    assert vllm.args == ("--seed", "1")
    assert found.classes["chat"].tpot_seconds == 0.05
    assert found.classes["batch"].late == "refuse"
    assert (found.turn_seconds, found.memory.idle_before_eviction_seconds) == (60, 60)
    llama = found.models["llama"]
    assert (llama.model, llama.revision) == (str(tmp_path / "llama"), "0123")
    assert llama.aliases == ("gpt-4o", "4")
    assert llama.args == ("--max-model-len", "32768")
    assert (llama.class_name, llama.pin, llama.max_wait_seconds) == ("chat", True, 120)
    assert llama.kv.model_dump() == {"floor": GIB, "limit": "60%", "priority": 7}
    assert found.models["qwen"].model == "Qwen/Qwen3-32B"
    assert (found.models["qwen"].idle_limit_seconds, found.models["qwen"].max_wait_seconds) == (
        1800,
        5,
    )
    assert found.models["guard"].devices == ("GPU-6f1c",)
    nodes = {name: model.nodes for name, model in found.models.items() if model.nodes}
    assert nodes == {"llama": ("gpu=H100", "ray.io/market-type=spot"), "guard": ("spare",)}
    assert found.models["guard"].environment == "sglang"


def test_defaults_are_for_the_models_that_have_such_a_setting(read: Read, tmp_path: Path) -> None:
    found = read(FULL)
    fine, remote = found.models["fine"], found.models["remote"]
    assert (fine.is_adapter, remote.is_remote) == (True, True)
    assert fine.path == str(tmp_path.parent / "adapters" / "fine")
    assert (fine.max_wait_seconds, remote.max_wait_seconds) == (120, 120)
    assert (fine.environment, remote.environment) == (None, None)
    assert found.models["qwen"].when_idle == "stop"
    assert set(FIELD_KEYS.values()) >= DEFAULT_KEYS


def test_an_empty_file_has_no_models(read: Read) -> None:
    assert read("").models == {}
    assert read("models:\n").models == {}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("lisen: a:1", 1, "lisen is not a setting; did you mean 'listen'?"),
        ("\nlisten: 8080", 2, "listen='8080' is not allowed; write an address and a port"),
        ("listen: 127.0.0.1:99999", 1, "listen='127.0.0.1:99999' is not allowed; the largest port"),
        ("listen: 0.0.0.0:80", 1, "listen='0.0.0.0:80' is not allowed; others can reach it, so"),
        ("workers: many", 1, "workers='many' is not allowed; write a whole number"),
        ("workers: 0", 1, "workers='0' is not allowed; it must be greater than or equal to 1"),
        ("devices: [0, 0]", 1, "devices[1]='0' is not allowed; it is there twice"),
        ("devices: []", 1, "devices is empty; name a device"),
        ("devices: [host, 0]", 1, "devices=['host', '0'] is not allowed; 'host' stands alone"),
        ("devices: {a: b}", 1, "devices={'a': 'b'} is not allowed; write all, host, or a list"),
        ("devices:\n- ''", 2, "devices[0]='' is not allowed; it must not be empty"),
        ("host_memory: plenty", 1, "host_memory='plenty' is not allowed; write a size such as"),
        ("host_memory: 0", 1, "host_memory='0' is not allowed; it must be greater than 0"),
        (
            "engines_on_exit: keeep",
            1,
            "='keeep' is not allowed; use 'stop' or 'keep'; did you mean",
        ),
        ("memory: 3", 1, "memory has to be a table of settings"),
        ("memory:\n  min_worm: 3s", 2, "memory.min_worm is not a setting; did you mean 'min_warm'"),
        ("memory: {min_warm: soon}", 1, "memory.min_warm='soon' is not allowed; write a time such"),
        ("memory: {min_warm: [1]}", 1, "memory.min_warm=['1'] is not allowed; write a time such"),
        ("memory: {min_warm_seconds: 1}", 1, "is not a setting; did you mean 'min_warm'?"),
        ("classes: {a: {ttft: 0s}}", 1, "classes.a.ttft='0s' is not allowed; it must be greater"),
        ("classes: {a: {weight: inf}}", 1, "weight='inf' is not allowed; write a number"),
        ("placement: {move_gain: inf}", 1, "move_gain='inf' is not allowed; write a number"),
        ("memory: {min_warm: 11575d}", 1, "it must be less than or equal to 1000000000"),
        ("classes: {a: {name: b}}", 1, "classes.a.name is not a setting; there are 'ttft', "),
        ("environments: {a: {python: /p}}", 1, "environments.a.engine is missing"),
        ("environments: {a: }", 1, "environments.a.engine is missing"),
        ("environments: {a: {engine: trt, python: /p}}", 1, "use 'vllm' or 'sglang'"),
        ("models:\n  a b: {}", 2, "models.a b is no name: use letters, digits and . _ : / @ + -"),
        ("models: {a: }", 1, "models.a needs `model`, or `url` or `adapter_of` in its place"),
        (
            "models: {a: {model: m}}",
            1,
            "models.a needs `environment`, one of `environments`: there",
        ),
        ("models: [a]", 1, "models has to be a table of settings"),
        ("models: {a: {url: 'ftp://x'}}", 1, "models.a.url='ftp://x' is not allowed; write http"),
        ("models: {a: {url: 'http://u:p@x'}}", 1, "write http:// or https://"),
        (
            "models: {a: {url: 'http://x', pin: 1}}",
            1,
            "models.a.pin is no setting of one that `url`",
        ),
        ("models: {a: {url: 'http://x', key_env: NO}}", 1, "key_env='NO' is not allowed; no such"),
        ("defaults: {model: m}", 1, "defaults.model is not a setting"),
        (
            "defaults:\n\n  max_queue: 0\nmodels: {a: {url: 'http://x'}}",
            3,
            "defaults.max_queue='0'",
        ),
        ("models: {a: {url: 'http://x:99999'}}", 1, "is not allowed; Port out of range 0-65535"),
        ("models: {a: {url: 'http://x:'}}", 1, "is not allowed; write a port behind the ':'"),
        ("models: {a: {url: 'http://:80'}}", 1, "is not allowed; it needs a host"),
        ("models: {a: {url: 'http://[::1'}}", 1, "is not allowed; Invalid IPv6 URL"),
        (f"listen: {'a' * 64}:80", 1, "(UnicodeError: label too long)"),
        ('keys_file: "a\\0b"', 1, "keys_file has a NUL"),
        ('environments: {a: {"engine\\0": vllm}}', 1, "environments.a has a NUL"),
        ("a: 1\na: 2", 2, "a is there twice, first in line 1"),
        ("listen: *a", 1, "found undefined alias"),
        ("memory: &a {}\nplacement: *a", 2, "placement is an alias; write it out"),
        ("memory: &a {b: *a}", 1, "memory.b is an alias"),
        ("listen: !!python/object:os.system x", 1, "tags are not allowed"),
        ("listen: !!int 3", 1, "tags are not allowed"),
        ("? [a]\n: b", 1, "has a key that is no plain text"),
        ("listen: [", 1, "expected the node content"),
        ("- a", 1, "the file has to be a table of settings"),
        ("listen: ${TOKEN}", 1, "variables stand only in an environment's `env`"),
        ("a: " + "[" * 30 + "]" * 30, 1, "is nested too deeply"),
    ],
)
def test_a_mistake_is_one_error_with_its_line(
    read: Read, text: str, line: int, message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        read(text)
    told = str(raised.value)
    assert f"models.yaml, line {line}: " in told
    assert message in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{environment: vlm, model: m}", "environment='vlm' is not allowed; it has to be one of"),
        ("{environment: vlm, model: m}", "did you mean 'vllm'?"),
        ("{environment: vllm, model: m, path: p}", "path is no setting of a model that is neither"),
        ("{environment: vllm, model: -m}", "model='-m' is not allowed; it must not begin with '-'"),
        ("{environment: vllm, model: m, class: chat}", "class='chat' is not allowed; it has to be"),
        (
            "{environment: vllm, model: m, aliases: [one]}",
            "aliases[0]='one' is not allowed; it is a",
        ),
        ("{environment: vllm, model: m, aliases: x}", "aliases='x' is not allowed; write a list"),
        ("{environment: vllm, model: m, when_idle: slep}", "use 'yield', 'stop' or 'stay'"),
        ("{environment: vllm, model: m, pin: perhaps}", "pin='perhaps' is not allowed; write true"),
        ("{environment: vllm, model: m, kv: {flor: 1}}", "kv.flor is not a setting; did you mean"),
        ("{environment: vllm, model: m, kv: {floor: 2, limit: 1}}", "it is above `limit`, 1 bytes"),
        ("{environment: vllm, model: m, kv: {limit: 101%}}", "a share such as 50%, or none"),
        ("{environment: vllm, model: m, kv: {limit: [1]}}", "a share such as 50%, or none"),
        ("{environment: vllm, model: m, kv: {priority: 1001}}", "it must be less than or equal to"),
        ("{environment: vllm, model: m, warm_with: [onne]}", "did you mean 'one'?"),
        ("{environment: vllm, model: m, warm_with: [new]}", "has to name another model"),
        (
            "{environment: vllm, model: m, warm_at: [noon]}",
            "warm_at[0]='noon' is not allowed; write",
        ),
        (
            "{environment: vllm, model: m, warm_at: [daily 1:00 Mars]}",
            "no time zone is named 'Mars'",
        ),
        (
            "{environment: vllm, model: m, devices: [0], tensor_parallel: 2}",
            "name at least as many",
        ),
        (
            "{environment: vllm, model: m, nodes: []}",
            "nodes is empty; name a label, or",
        ),
        (
            "{environment: vllm, model: m, nodes: [a, b, a]}",
            "nodes[2]='a' is not allowed; it is ",
        ),
        (
            "{environment: vllm, model: m, nodes: [a b]}",
            "nodes[0]='a b' is not allowed; write a",
        ),
        (
            "{environment: vllm, model: m, nodes: gpu=}",
            "nodes='gpu=' is not allowed; write a la",
        ),
        ("{environment: vllm, model: m, nodes: a=b=c}", "nodes='a=b=c' is not allowed; write a"),
        (
            "{environment: vllm, model: m, nodes: {gpu: a}}",
            "nodes={'gpu': 'a'} is not allowed; w",
        ),
        ("{adapter_of: one, path: p, nodes: a}", "nodes is no setting of an adapter; remove it"),
        ("{url: 'http://x', nodes: a}", "nodes is no setting of one that `url` serves; remove it"),
        ("{environment: vllm, model: m, args: [--host, x]}", "args[0]='--host' is not allowed; it"),
        (
            "{environment: vllm, model: m, args: [-O3, --po=1]}",
            "args[1]='--po=1' is not allowed; it",
        ),
        (
            "{environment: sglang, model: m, args: [--tp=2]}",
            "it sets --tp-size, and the gateway cho",
        ),
        (
            "{adapter_of: oen, path: p}",
            "it has to name a model with an engine; did you mean 'one'?",
        ),
        ("{adapter_of: one}", "path is missing: the adapter's folder, or name on the hub"),
        ("{adapter_of: one, path: p, args: [x]}", "args is no setting of an adapter; remove it"),
        ("{environment: vllm, model: m, id: x}", "id is not a setting"),
    ],
)
def test_a_mistake_in_a_model_names_its_key_and_line(read: Read, model: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(f"{TWO}  new: {model}\n")
    told = str(raised.value)
    assert "models.yaml, line 8: models.new" in told
    assert message in told


def test_two_models_cannot_share_an_instance_name(read: Read) -> None:
    with pytest.raises(ConfigError, match="has the instance name of 'a-b'"):
        read(f"{TWO}  a-b: {{environment: vllm, model: m}}\n  a/b: {{environment: vllm, model: m}}")


def test_devices_of_a_model_are_some_of_the_gateways(read: Read) -> None:
    with pytest.raises(ConfigError, match="has to be one of the gateway's `devices`"):
        read(f"devices: [0]{TWO}  new: {{environment: vllm, model: m, devices: [1]}}")
    with pytest.raises(ConfigError, match="`devices` names 1 of them"):
        read(f"devices: [0]{TWO}  new: {{environment: vllm, model: m, tensor_parallel: 2}}")
    with pytest.raises(ConfigError, match="engines on the host have one device"):
        read(f"devices: host{TWO}  new: {{environment: vllm, model: m, tensor_parallel: 2}}")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("{A: $TOKEN}", None),  # no braces: as it is written
        ("{A: '${NOBODY}'}", "names the variable 'NOBODY', which is not set"),
        ("{A: '${TOKEN'}", "has a '${' that is not of the form"),
        ("{A: [b]}", "has to be text"),
        ("{A=B: c}", "env.A=B is no name of a variable"),
        ("{'': c}", "env. is no name of a variable"),
        ('{A: "b\\0"}', "env.A has a NUL"),
        ("{KVCACHED_FLOR: 1}", "env is refused by every engine: KVCACHED_FLOR is not a setting"),
        ("{KVCACHED_HEADROOM: lots}", "KVCACHED_HEADROOM='lots' is not a size"),
        ("{KVCACHED_NAME: x}", "cannot be set: the gateway decides it; remove it"),
        ("{CUDA_VISIBLE_DEVICES: 1}", "cannot be set: the gateway chooses devices"),
    ],
)
def test_variables_of_an_environment(read: Read, env: str, message: str | None) -> None:
    text = f"environments: {{a: {{engine: vllm, python: /p, env: {env}}}}}"
    if message is None:
        assert read(text).environments["a"].env == {"A": "$TOKEN"}
        return
    with pytest.raises(ConfigError) as raised:
        read(text)
    assert message in str(raised.value)


def test_a_variable_of_the_gateways_own_that_ends_every_engine_ends_the_start(
    tmp_path: Path,
) -> None:
    file = tmp_path / "models.yaml"
    file.touch(mode=0o600)
    with pytest.raises(ConfigError, match="KVCACHED_PRIORTY is not a setting; did you mean"):
        read_settings(file, {"KVCACHED_PRIORTY": "1"})


def test_what_may_be_a_secret_is_in_no_error(read: Read) -> None:
    for text in (
        "environments: {a: {engine: vllm, python: /p, env: {A: '${TOKEN}', KVCACHED_DIR: hush}}}",
        "models: {a: {url: 'http://x', key_env: hush-1}}",
    ):
        with pytest.raises(ConfigError) as raised:
            read(text)
        assert "hush" not in str(raised.value)


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602, 0o777])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "models.yaml"
    path.touch()
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"has mode {mode:04o}, others may write it: chmod go-w"):
        read_settings(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.touch()
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        read_settings(path)


def test_what_is_no_file_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_settings(tmp_path / "models.yaml")
    with pytest.raises(ConfigError, match="is not a file"):
        read_settings(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="is not a file"):
        read_settings(tmp_path / "pipe")  # and does not wait for a writer
    path = tmp_path / "models.yaml"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read_settings(path)
    path.write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(ConfigError, match="is larger than"):
        read_settings(path)


WORDS = st.sampled_from(
    [
        "",
        "a",
        "m",
        "vllm",
        "all",
        "host",
        "0",
        "-1",
        "5s",
        "1GiB",
        "true",
        "~",
        "{}",
        "[]",
        "{a: b}",
        "[a, b]",
        "${A}",
        "--port",
        "http://x",
    ]
)


def error_of(path: Path) -> str | None:
    try:
        read_settings(path, {})
    except ConfigError as error:
        return str(error)
    return None


@given(st.data())
def test_any_file_is_settings_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    keys = st.sampled_from(sorted(FIELD_KEYS.values()))
    model = data.draw(st.dictionaries(keys, WORDS, max_size=4))
    top = data.draw(st.dictionaries(st.sampled_from(sorted(Settings.keys())), WORDS, max_size=2))
    text = f"{TWO}  new: {{{', '.join(f'{key}: {value}' for key, value in model.items())}}}\n"
    text += "".join(f"{key}: {value}\n" for key, value in top.items())
    path.write_text(text)
    told = error_of(path)
    assert told is None or told.startswith(f"{path}, line ")
    assert told is None or "\n" not in told


@given(st.text())
def test_any_text_is_settings_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, errors="ignore")
    told = error_of(path)
    assert told is None or told.startswith(str(path))
