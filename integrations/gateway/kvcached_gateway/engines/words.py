"""What the gateway has to know of an engine, in no engine's words."""

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from kvcached_gateway.errors import EngineStartError
from kvcached_gateway.lease import Address
from kvcached_gateway.settings.config import HOST, Environment, ModelSettings

# The name of a counter, and what its labels have to have.
Sample = tuple[str, str]
__all__ = ["Counters", "EngineWords", "Question", "count"]

# Every model that was ever trained goes on with this the same way, whatever its batch looks like.
PROMPT = "1, 2, 3, 4, 5, 6, 7, 8, 9,"
LEAST_COSINE = 0.99
NUM_KEPT_VALUES = 32
LENGTH = re.compile(r"(\d+(?:\.\d+)?)([kKmM]?)")
LENGTH_UNITS = {"": 1, "k": 1000, "K": 1 << 10, "m": 1_000_000, "M": 1 << 20}
CONNECTION_SECONDS = 3600  # only we connect, so no idle connection has to be closed soon
# What the log of a start ends with where memory was missing; each engine adds its own.
OUT_OF_MEMORY = (
    *("out of memory", "OutOfMemoryError", "NoRoomError", "HostBudgetError"),
    *("kvcached: there is no room", "there is no room for this engine's first page"),
)


@dataclass(frozen=True)
class Counters:
    """What an engine says of its work; tokens since its start.

    Attributes:
        num_running: Requests that it computes.
        num_waiting: Requests in its own queue.
        num_prompt_tokens: Tokens of prompts that it took in, cached ones included.
        num_cached_tokens: Those of them that it did not compute.
        num_generated_tokens: Tokens that it answered.
    """

    num_running: int
    num_waiting: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int

    @property
    def num_tokens(self) -> int:
        """All tokens; while requests run and it works, this grows."""
        return self.num_prompt_tokens + self.num_generated_tokens


@dataclass(frozen=True)
class Question:
    """A request of ours to an engine."""

    path: str
    body: Mapping[str, Any]


class EngineWords(ABC):
    """One engine's words; an object of it has no state.

    Attributes:
        name: As `environments:` calls it.
        ready_path: What answers 200 when it is up, and answers soon.
        health_path: What answers 200 while its processes talk to each other.
        metrics_path: Its counters, as Prometheus reads them.
        load_path, unload_path: Where adapters come and go.
        counters: Where the values of `Counters` are, in its order; they move while requests run.
        out_of_memory: What its log says of a start that found too little memory.
        adapter_flags: The flags that say how many adapters it keeps, the one that counts first.
        num_adapters: How many that are where no flag says so.
        length_flag: The flag that says how many tokens a request may have.
    """

    name: ClassVar[str]
    ready_path: ClassVar[str]
    health_path: ClassVar[str] = "/health"
    metrics_path: ClassVar[str] = "/metrics"
    load_path: ClassVar[str]
    unload_path: ClassVar[str]
    counters: ClassVar[tuple[Sample, Sample, Sample, Sample, Sample]]
    out_of_memory: ClassVar[tuple[str, ...]] = OUT_OF_MEMORY
    adapter_flags: ClassVar[tuple[str, ...]]
    num_adapters: ClassVar[int]
    length_flag: ClassVar[str]

    @abstractmethod
    def address(self, folder: Path, name: str) -> Address:
        """Return where a new engine is to listen; its key, if it needs one, is among the headers.

        Args:
            folder: The folder of engines' sockets and key files, which only we can enter.
            name: A name for its files that no other engine has.
        """

    @abstractmethod
    def command(
        self,
        settings: ModelSettings,
        environment: Environment,
        devices: Sequence[str],
        address: Address,
        keys: Path,
    ) -> list[str]:
        """Return the program and its arguments.

        Args:
            settings: The model; it has a `model`, which is neither elsewhere nor an adapter.
            environment: Where the engine is.
            devices: The devices' names in the ledger's words.
            address: Where it is to listen.
            keys: A file for a key, which no command line may show.
        """

    def key_file(self, address: Address) -> str | None:
        """Return what the file for its key has to hold, or None where it needs none."""
        del address
        return None

    def environ(
        self, settings: ModelSettings, environment: Environment, devices: Sequence[str]
    ) -> dict[str, str]:
        """Return the variables that it has beside those of the gateway itself.

        The file's own `env:` comes before ours, except where a name or a device is concerned.
        """
        variables = {
            "ENABLE_KVCACHED": "1",
            "KVCACHED_WEIGHTS": "yield" if settings.when_idle == "yield" else "keep",
            "PYTHONFAULTHANDLER": "1",  # a hung engine that is aborted writes its stacks
        }
        variables |= environment.env
        kv = settings.kv
        for key, value in (("LIMIT", kv.limit), ("FLOOR", kv.floor), ("PRIORITY", kv.priority)):
            if value is not None:
                variables[f"KVCACHED_{key}"] = str(value)
        variables["KVCACHED_NAME"] = settings.instance_name
        if tuple(devices) != (HOST,):
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        return variables

    def serves(self, settings: ModelSettings, name: str) -> bool:
        """Return whether an engine that was started with these settings calls its model so."""
        return name in {settings.id, *settings.aliases}

    @abstractmethod
    def adapter_name(self, base: ModelSettings, adapter: str) -> str:
        """Return what it calls an adapter that clients ask for under this name.

        Raises:
            EngineStartError: If it could not be asked for that name.
        """

    def question(self, settings: ModelSettings) -> Question:
        """Return the request that shows that it computes."""
        if settings.kind == "pooling":
            return Question("/v1/embeddings", {"model": settings.id, "input": PROMPT})
        return Question(
            "/v1/completions",
            {
                "model": settings.id,
                "prompt": PROMPT,
                "max_tokens": 1,
                "temperature": 0,
                "ignore_eos": True,
                "skip_special_tokens": False,
            },
        )

    def answer(self, body: bytes) -> str:
        """Return what is kept of the answer to the question: one token, or one vector's beginning.

        Raises:
            EngineStartError: If that is no answer.
        """
        try:
            found = json.loads(body)
            if "data" in found:
                (first, *_) = found["data"]
                vector = first["embedding"] if "embedding" in first else first["data"]
                values = [float(each) for each in vector[:NUM_KEPT_VALUES]]
                if not values or not all(map(math.isfinite, values)):
                    raise EngineStartError(f"it answered a vector that is none: {values[:4]}")
                return json.dumps(values)
            # Quoted: half a character is no text, and yet an answer to compare with.
            return json.dumps(str(found["choices"][0]["text"]))
        except (ValueError, LookupError, TypeError) as error:
            text = body[:200].decode(errors="replace")
            raise EngineStartError(f"its answer to a known prompt is none: {text!r}") from error

    def is_same(self, answer: str, known: str, settings: ModelSettings) -> bool:
        """Return whether two answers are those of the same weights."""
        if settings.kind != "pooling":
            return answer == known
        one, two = json.loads(answer), json.loads(known)
        if len(one) != len(two):
            return False
        if len(one) == 1:  # a score; it has no direction
            return math.isclose(one[0], two[0], rel_tol=1 - LEAST_COSINE, abs_tol=1 - LEAST_COSINE)
        size = math.hypot(*one) * math.hypot(*two)
        return bool(size and sum(map(float.__mul__, one, two)) / size >= LEAST_COSINE)

    def read_counters(self, exposition: str) -> Counters:
        """Return its counters; those that it does not have yet are 0."""
        return Counters(*(count(exposition, *sample) for sample in self.counters))

    def served_names(self, body: bytes) -> frozenset[str]:
        """Return the names in an answer of `/v1/models`; nothing where it is none."""
        try:
            return frozenset(str(each["id"]) for each in json.loads(body)["data"])
        except (ValueError, LookupError, TypeError):
            return frozenset()

    def max_adapters(self, words: Sequence[str]) -> int:
        """Return how many adapters it keeps, by its arguments."""
        given = dict(_flags(words))
        for flag in self.adapter_flags:
            if given.get(flag, "").isdecimal():
                return max(int(given[flag]), 1)
        return self.num_adapters

    def max_tokens(self, words: Sequence[str]) -> int | None:
        """Return how many tokens a request may have, by its arguments; None where none says it."""
        found = LENGTH.fullmatch(dict(_flags(words)).get(self.length_flag, ""))
        return None if found is None else int(float(found[1]) * LENGTH_UNITS[found[2]]) or None


def count(exposition: str, name: str, label: str = "") -> int:
    """Return the sum of all samples of one name, of those with a label where one is given."""
    total = 0.0
    for line in exposition.splitlines():
        if line.startswith(name) and line[len(name) : len(name) + 1] in {"{", " "}:
            if label not in line:
                continue
            total += float(line.rpartition(" ")[2])
    return int(total)


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for word, following in pairwise((*words, "")):
        flag, is_joined, value = word.partition("=")
        yield flag, value if is_joined else following
