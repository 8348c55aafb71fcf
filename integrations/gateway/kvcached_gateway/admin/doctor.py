"""What `kvcached doctor`, and `kvcached serve FILE --check`, say of a file of models.

Nothing is started but an environment's Python, to ask it which engine it has.
"""

import json
import os
import resource
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvcached_core.config import read_config
from kvcached_core.errors import KVCachedError
from kvcached_core.ledger.opening import MAX_ADDRESS_BYTES
from kvcached_core.memory.host_memory import host_memory
from kvcached_core.memory.model_bytes import files_bytes
from kvcached_core.units import format_bytes
from kvcached_gateway.admin.client import Client, GatewayError, NoGatewayError
from kvcached_gateway.settings.config import HOST, Environment, ModelSettings, Settings

__all__ = ["Said", "examine", "findings"]

Said = tuple[bool, str]  # whether it is as it should be, and a text
FILE = Path("models.yaml")
PYTHON_SECONDS = 120.0  # importing an engine takes seconds, on a busy machine many
FILES_A_REQUEST = 2
OF_A_START = "-000000"  # what the runner adds to an engine's name at each start is as long
MANY_REQUESTS = 2048
# Asks a Python what our adapter there says of its engine, and whether that can be imported.
QUESTION = """
import importlib, json, sys
from importlib.metadata import entry_points
engine, not_installed = sys.argv[1:]
entries = list(entry_points(group="kvcached.doctor", name=engine))
found = [pair for entry in entries for pair in entry.load()()]
if not entries:
    found = [(False, "kvcached-elastic is not installed there; install it beside the engine")]
elif all(is_good and text != not_installed for is_good, text in found):
    try:
        importlib.import_module(engine)
    except BaseException as error:
        found.append((False, f"`import {engine}` fails: {type(error).__name__}: {error}"))
print("\\n" + json.dumps(found))
"""
NOT_INSTALLED = "not installed here"


def findings() -> Iterator[Said]:
    """Yield what there is to say of the gateway that runs, or else of `models.yaml` here."""
    try:
        from kvcached_gateway.settings.config_file import read_settings
    except ImportError as error:  # whoever has no gateway needs none of this
        yield True, f"not installed here ({error}); pip install 'kvcached-elastic[gateway]'"
        return
    directory = read_config().dir
    try:
        file = Path(Client(directory).about().file)
        yield True, f"one serves {file} from {directory}"
    except NoGatewayError:
        if not FILE.exists():
            yield True, f"none runs; no {FILE} here (`kvcached serve FILE --check` looks at one)"
            return
        file = FILE
    except GatewayError as error:
        yield False, str(error)
        return
    try:
        settings = read_settings(file)
    except KVCachedError as error:
        yield False, str(error)
        return
    yield from examine(settings, directory)


def examine(settings: Settings, directory: Path) -> Iterator[Said]:
    """Yield what a gateway would find that serves these settings from a folder of ledgers."""
    models = list(settings.models.values())
    engines = [model for model in models if not model.is_remote and not model.is_adapter]
    yield True, f"{settings.path}: {len(models)} models, {len(engines)} of them with engines here"
    yield from _keys(settings)
    yield from _environments(settings)
    yield from _models(engines)
    yield from _sockets(engines, directory)
    yield from _address(settings, directory)
    yield from _memory(settings, engines)
    yield _handles()


def _keys(settings: Settings) -> Iterator[Said]:
    if settings.keys_file is None:
        return
    from kvcached_gateway.settings.keys import Keys

    try:
        keys = Keys.read(settings.keys_file)
        keys.check(settings)
    except KVCachedError as error:
        yield False, str(error)
        return
    yield bool(keys.all), f"{settings.keys_file}: {len(keys.all)} keys"


def _environments(settings: Settings) -> Iterator[Said]:
    found = settings.environments
    with ThreadPoolExecutor(max(len(found), 1)) as pool:
        answers = pool.map(_ask, found.values())
        for environment, said in zip(found.values(), answers, strict=True):
            for is_good, text in said:
                yield is_good, f"environment {environment.name} ({environment.engine}): {text}"


def _ask(environment: Environment) -> list[Said]:
    python = environment.python
    if not (python.is_file() and os.access(python, os.X_OK)):
        return [(False, f"{python} is no program; `python` has to name an interpreter")]
    try:
        done = subprocess.run(  # noqa: S603  the file's own interpreter
            [python, "-c", QUESTION, environment.engine, NOT_INSTALLED],
            env={**os.environ, **environment.env},
            cwd="/",  # so that nothing that lies here is imported
            capture_output=True,
            text=True,
            timeout=PYTHON_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [(False, f"{python} does not answer: {error}")]
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return [(False, f"{python} ends with {done.returncode}: {last}")]
    pairs = json.loads(lines[-1])
    return [
        (False, f"{environment.engine} is not installed in {python}")
        if text == NOT_INSTALLED
        else (bool(is_good), str(text))
        for is_good, text in pairs
    ]


def _models(engines: list[ModelSettings]) -> Iterator[Said]:
    for model in engines:
        folder = Path(model.model or "")
        if folder.is_absolute() and not (folder / "config.json").is_file():
            yield False, f"model {model.id}: {folder} has no config.json"
    labelled = ", ".join(model.id for model in engines if model.nodes)
    if labelled:
        yield True, f"`nodes` is for many machines; one gateway serves these anywhere: {labelled}"


def _sockets(engines: list[ModelSettings], directory: Path) -> Iterator[Said]:
    folder = directory / "gateway" / "engines"
    names = [model.instance_name for model in engines] or [""]
    path = folder / f"{max(names, key=len)}{OF_A_START}.sock"
    length = len(os.fsencode(path))
    is_good = length <= MAX_ADDRESS_BYTES
    text = f"the longest engine's socket is {path}, {length} of {MAX_ADDRESS_BYTES} bytes"
    yield is_good, text if is_good else f"{text}: set KVCACHED_DIR shorter, or rename the model"


def _address(settings: Settings, directory: Path) -> Iterator[Said]:
    try:
        Client(directory).about()
    except GatewayError:
        pass  # nobody serves, so the address has to be free
    else:
        return
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
    except OSError as error:
        yield False, f"{settings.listen} cannot be listened on: {error.strerror}"
    else:
        yield True, f"{settings.listen} is free"


def _memory(settings: Settings, engines: list[ModelSettings]) -> Iterator[Said]:
    usable_bytes = host_memory().usable_bytes
    given = settings.host_memory_bytes
    budget = "half of what is free" if given is None else f"{format_bytes(given)} (host_memory)"
    usable = format_bytes(usable_bytes)
    text = f"engines and their copies may take {budget}; a process may use {usable} here"
    yield given is None or given <= usable_bytes, text
    if settings.devices == (HOST,):
        return  # weights have no copies there
    copies = {model.id: _weights_bytes(model) for model in engines if model.when_idle == "yield"}
    if any(copies.values()):
        total = format_bytes(sum(copies.values()))
        yield True, f"host copies of all models here that yield take {total}"
    for name, num_bytes in copies.items():
        if given is not None and num_bytes > given:
            num = format_bytes(num_bytes)
            yield False, f"model {name}: its host copy, {num}, is more than host_memory"


def _weights_bytes(model: ModelSettings) -> int:
    """Return what a local model's files hold; nothing is known of one on the hub."""
    folder = Path(model.model or "")
    return files_bytes(folder) if folder.is_absolute() and folder.is_dir() else 0


def _handles() -> Said:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = soft if hard == resource.RLIM_INFINITY else hard
    num_requests = most // FILES_A_REQUEST
    text = f"{most} open files, for about {num_requests} requests at once"
    is_good = num_requests >= MANY_REQUESTS
    return is_good, text if is_good else f"{text}; raise it (`ulimit -n`, systemd: LimitNOFILE)"
