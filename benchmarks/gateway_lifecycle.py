"""How soon a new gateway has adopted four engines, and what of a wake is the gateway's own.

    python benchmarks/gateway_lifecycle.py --json benchmarks/results/gateway_lifecycle.json

A first gateway, a process of its own, starts four vLLM servers on the CPU and is killed. This
process adopts them several times. Then it makes one give its weights, asks for it through the line,
and sends it a request: the time to the lease is the gateway's, the rest its engine's.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from parts.machine import describe_machine
from parts.record import write

from kvcached_core import control
from kvcached_core.units import GIB
from kvcached_demo.harness.engines import VLLM
from kvcached_demo.harness.model import make_model
from kvcached_gateway.engines.runner import Runner
from kvcached_gateway.engines.sessions import kill_session, orphans
from kvcached_gateway.engines.state_file import Folder
from kvcached_gateway.lease import Ask, Ending, Lease, Woken
from kvcached_gateway.line.line import Line
from kvcached_gateway.models.model import Model
from kvcached_gateway.settings.config import HOST, Environment, ModelSettings, Settings
from kvcached_gateway.state import State

NAMES = tuple(f"model-{number}" for number in range(4))
NUM_ADOPTIONS = 10
NUM_WAKES = 20
START_SECONDS = 600.0
PATH = "/v1/completions"
ENVIRON = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "KVCACHED_HOST_POOL": str(GIB),
}


def settings_of(directory: Path) -> Settings:
    """Return a file's settings: four names of one tiny model."""
    environment = Environment(
        name="vllm", engine="vllm", python=Path(VLLM.python), args=VLLM.host_options
    )
    weights = str(directory / "tiny")
    return Settings(
        path=directory / "models.yaml",
        environments={"vllm": environment},
        models={name: ModelSettings(id=name, environment="vllm", model=weights) for name in NAMES},
    )


def make_runner(folder: Folder, directory: Path, settings: Settings) -> Runner:
    """Return what starts and adopts the engines."""
    environ = {**os.environ, **ENVIRON, "TMPDIR": str(directory)}
    return Runner(folder, directory, lambda: settings.environments, environ, directory)


async def be_a_gateway(directory: Path) -> None:
    """Start the engines one by one, write down what runs, and wait to be killed."""
    settings = settings_of(directory)
    folder = Folder(directory)
    runner = make_runner(folder, directory, settings)
    models = [Model(each, runner) for each in settings.models.values()]
    for model in models:
        model.start((HOST,), "a benchmark wants it")
        await model.settled()
        if model.state is not State.WARM:
            raise RuntimeError(model.failure)
        folder.write([record for each in models if (record := each.record())])
    print("up", flush=True)
    await asyncio.Event().wait()


async def adopt(folder: Folder, directory: Path) -> tuple[dict[str, Model], float]:
    """Return the models of all engines that were left, and how many ms their adoption took."""
    begun = time.perf_counter()
    settings = settings_of(directory)
    runner = make_runner(folder, directory, settings)
    records = {record.model_id: record for record in folder.read()}
    models = {name: Model(each, runner) for name, each in settings.models.items()}
    for name, model in models.items():
        model.adopt(records[name])
    await asyncio.gather(*(model.settled() for model in models.values()))
    milliseconds = (time.perf_counter() - begun) * 1e3
    for name, model in models.items():
        record = model.record()
        if model.state is not State.WARM or record is None:
            raise RuntimeError(f"{name} was not adopted: {model.reason}")
        if record.identity != records[name].identity:
            raise RuntimeError(f"{name} is another process")
    return models, milliseconds


async def answer_of(session: aiohttp.ClientSession, lease: Lease) -> None:
    """Send the lease's engine a request for one token, and read the answer."""
    body = {"model": lease.model_id, "prompt": "memory", "max_tokens": 1, "ignore_eos": True}
    async with session.post(PATH, json=body) as answer:
        answer.raise_for_status()
        await answer.read()


async def wake(models: dict[str, Model], directory: Path) -> dict[str, list[float]]:
    """Return what the lease and the answer of a yielded model took, in ms."""
    settings = settings_of(directory)
    line = Line(models, lambda: settings, asyncio.get_running_loop().time, lambda _name: None)
    name = NAMES[0]
    model = models[name]
    times: dict[str, list[float]] = {"lease_ms": [], "answer_ms": [], "warm_answer_ms": []}
    engine = model.engine
    if engine is None:
        raise RuntimeError("it has no engine")
    connector = aiohttp.UnixConnector(str(engine.address.socket))
    async with aiohttp.ClientSession(engine.address.url, connector=connector) as session:
        for _ in range(NUM_WAKES):
            await asyncio.to_thread(control.sleep, name, directory=directory, wait_seconds=10.0)
            (device,) = await asyncio.to_thread(control.devices, directory)
            model.observed({row.name: row for row in device.instances}[name])
            if model.state is not State.YIELDED:
                raise RuntimeError(f"it did not yield: it is {model.state}")
            for key in ("answer_ms", "warm_answer_ms"):
                begun = time.perf_counter()
                lease = await line.take(Ask(name, PATH, 100))
                granted = time.perf_counter()
                if key == "answer_ms":
                    if lease.woken is not Woken.WAKE:
                        raise RuntimeError("the lease does not say that its request woke it")
                    times["lease_ms"].append((granted - begun) * 1e3)
                await answer_of(session, lease)
                times[key].append((time.perf_counter() - granted) * 1e3)
                lease.end(Ending.DONE)
    return times


async def measure(directory: Path) -> dict[str, Any]:
    """Adopt several times, wake several times, and end the engines."""
    adoptions = []
    with Folder(directory) as folder:
        for _ in range(NUM_ADOPTIONS):
            models, milliseconds = await adopt(folder, directory)
            adoptions.append(milliseconds)
            await asyncio.gather(*(model.close(is_kept=True) for model in models.values()))
        models, _ = await adopt(folder, directory)
        try:
            wakes = await wake(models, directory)
        finally:
            await asyncio.gather(*(model.close(is_kept=False) for model in models.values()))
    return {
        "num_engines": len(NAMES),
        "adoption_ms": summary(adoptions),
        "wake": {name: summary(values) for name, values in wakes.items()},
    }


async def end_all(directory: Path) -> None:
    """End the engines that are left where something failed."""
    for identity in orphans(directory / "gateway", []):
        await kill_session(identity)


def summary(values: list[float]) -> dict[str, float]:
    """Return median and ends."""
    return {"p50": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--gateway", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.gateway:
        asyncio.run(be_a_gateway(options.gateway))
        return
    with tempfile.TemporaryDirectory(prefix="kvgw-") as name:
        directory = Path(name)
        make_model(directory / "tiny", seed=1)
        words = [sys.executable, __file__, "--gateway", name]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as gateway:
            said = gateway.stdout.readline() if gateway.stdout else ""
            gateway.send_signal(signal.SIGKILL)
        load = os.getloadavg()[0]
        results = {"machine": describe_machine(), "load_before": load}
        try:
            if said != "up\n":
                raise RuntimeError("the first gateway did not come up")
            results |= asyncio.run(measure(directory))
        finally:
            asyncio.run(end_all(directory))
    print(json.dumps(results, indent=2))
    if options.json:
        write(options.json, results)


if __name__ == "__main__":
    main()
