"""Serverless: nothing runs until somebody asks, and nothing is left when nobody does."""

import time
from pathlib import Path

from openai import OpenAI

from kvcached_demo.harness.way import Gateway, run

IDLE_SECONDS = 900.0  # at most until a model is gone; its idle_limit is shorter


def ask(client: OpenAI, gateway: Gateway) -> None:
    """Ask the first model, and print what it took and who runs."""
    began = time.monotonic()
    client.completions.create(model="first", prompt="memory", max_tokens=8)
    states = {name: model["state"] for name, model in gateway.models().items()}
    print(f"answered after {time.monotonic() - began:.1f} s; now {states}")


def show(gateway: Gateway) -> None:
    """Ask a model that does not run, twice, and wait until it is gone."""
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=600) as client:
        ask(client, gateway)
        ask(client, gateway)
        gateway.await_state("first", "cold", IDLE_SECONDS)
        states = {name: model["state"] for name, model in gateway.models().items()}
        print(f"nobody asked: {states}")


if __name__ == "__main__":
    raise SystemExit(run(show, Path(__file__).parent))
