"""What the file of models says, as values: sizes in bytes, durations in seconds.

A field is the key of its name in the file, or of its alias where it names its unit. `config_file`
reads the file, and `config_checks` sees that its parts fit together.
"""

import hashlib
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from kvcached_core.units import MAX_NAME_LENGTH, MAX_PRIORITY, MIB, MIN_PRIORITY
from kvcached_gateway.settings.loopback import is_loopback
from kvcached_gateway.settings.tables import (
    AllDevices,
    Devices,
    Listen,
    Nodes,
    NotNegative,
    Positive,
    PublicName,
    Text,
    Url,
    Values,
    VariableName,
)
from kvcached_gateway.settings.units import Size, SizeOrShare, WarmTimeText

HOST = "host"  # the device of engines that run on the CPU
MAX_WORKERS = 64
_DIGEST_LENGTH = 8
_NOT_OF_A_NAME = re.compile(r"[^A-Za-z0-9._-]")


class Environment(Values):
    """A Python that has an engine: the only programs that are ever started."""

    GIVEN: ClassVar = frozenset({"name"})

    name: str
    engine: Literal["vllm", "sglang"] = Field(description="which engine it has")
    python: Path = Field(
        description="its interpreter; a relative path is one from the file's folder"
    )
    env: dict[str, str] = Field(
        default_factory=dict,
        repr=False,  # it may hold secrets
        description="variables for its engines; `${NAME}` is put in from the gateway's own",
    )
    args: tuple[str, ...] = Field(default=(), description="arguments of all its engines")


class ServiceClass(Values):
    """Goals of a kind of request, no promises."""

    GIVEN: ClassVar = frozenset({"name"})

    name: str
    ttft_seconds: Positive | None = Field(
        default=None, validation_alias="ttft", description="the time to the first token to aim at"
    )
    tpot_seconds: Positive | None = Field(
        default=None, validation_alias="tpot", description="the time for each further token"
    )
    late: Literal["wait", "refuse"] = Field(
        default="wait", description="what becomes of a request that will miss its goal"
    )
    weight: float = Field(
        default=1.0, gt=0, description="how much its requests count when a model has to go"
    )


class MemorySettings(Values):
    """Who may be stopped for somebody else."""

    idle_before_eviction_seconds: NotNegative = Field(
        default=45.0,
        validation_alias="idle_before_eviction",
        description="how long a model has to be idle before it is stopped for another",
    )
    min_warm_seconds: NotNegative = Field(
        default=20.0,
        validation_alias="min_warm",
        description="the same where requests wait for the other",
    )
    starts_apart_seconds: NotNegative = Field(
        default=60.0,
        validation_alias="starts_apart",
        description="no model is stopped for another sooner after its start began",
    )


class PlacementSettings(Values):
    """Which device a model starts on, and when it moves."""

    window_seconds: Positive = Field(
        default=60.0, validation_alias="window", description="how far back rates are measured"
    )
    move_gain: float = Field(
        default=0.2, ge=0, description="how much of its device's pressure a move has to take away"
    )
    move_pause_seconds: NotNegative = Field(
        default=120.0,
        validation_alias="move_pause",
        description="how long a model stays where it moved to",
    )


class KvSettings(Values):
    """What an engine may map; unset is as the environment's variables say."""

    floor: SizeOrShare | None = Field(default=None, description="as `KVCACHED_FLOOR`")
    limit: SizeOrShare | None = Field(default=None, description="as `KVCACHED_LIMIT`")
    priority: Annotated[int, Field(ge=MIN_PRIORITY, le=MAX_PRIORITY)] | None = Field(
        default=None, description="as `KVCACHED_PRIORITY`"
    )


class ModelSettings(Values):
    """A model: an engine of ours, one elsewhere (`url`), or an adapter of another model."""

    GIVEN: ClassVar = frozenset({"id"})

    id: PublicName
    environment: Text | None = Field(default=None, description="which of `environments` runs it")
    model: Text | None = Field(default=None, description="a folder, or a name on the model hub")
    revision: Text | None = Field(default=None, description="which revision of it on the hub")
    aliases: tuple[PublicName, ...] = Field(default=(), description="further names of it")
    args: tuple[str, ...] = Field(default=(), description="further arguments of its engine")
    class_name: Text | None = Field(
        default=None, validation_alias="class", description="which of `classes` it has"
    )
    pin: bool = Field(default=False, description="whether it is never stopped for another")
    kv: KvSettings = Field(default=KvSettings(), description="what it may map (below)")
    tensor_parallel: int = Field(default=1, ge=1, description="on how many devices it lies")
    when_idle: Literal["yield", "stop", "stay"] = Field(
        default="yield",
        description="what it does without requests: give its weights to who asks, be stopped "
        "where memory is needed, or neither",
    )
    idle_limit_seconds: Positive | None = Field(
        default=None,
        validation_alias="idle_limit",
        description="how long without a request until it is stopped, whoever needs memory",
    )
    max_wait_seconds: Positive = Field(
        default=300.0,
        validation_alias="max_wait",
        description="how long a request waits, a start included; then it is refused",
    )
    max_queue: int = Field(default=512, ge=1, description="how many requests wait at most")
    max_concurrent: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="how many requests its engine has at once"
    )
    start_limit_seconds: Positive = Field(
        default=900.0,
        validation_alias="start_limit",
        description="how long its start may take",
    )
    loading: Literal["hold", "comments", "refuse"] = Field(
        default="hold",
        description="what a request gets while it starts: nothing yet, comments in its stream, "
        "or a refusal",
    )
    warm_at: tuple[WarmTimeText, ...] = Field(
        default=(),
        description="when it is started without a request, such as `mon-fri 07:50 Europe/Berlin`",
    )
    warm_with: tuple[Text, ...] = Field(default=(), description="models that it is started beside")
    devices: Devices | None = Field(default=None, description="the devices that it may have")
    nodes: Nodes = Field(
        default=(),
        description="labels of nodes, of which a node needs one to have it, on many machines",
    )
    url: Url | None = Field(
        default=None, description="where it is served already; never started or stopped"
    )
    key_env: VariableName | None = Field(
        default=None, description="the variable that holds its key"
    )
    adapter_of: Text | None = Field(default=None, description="the model that it is an adapter of")
    path: Text | None = Field(default=None, description="the adapter's folder")
    kind: Literal["generate", "pooling"] = Field(
        default="generate",
        description="whether it answers with tokens, or with a vector or a score",
    )

    @property
    def is_remote(self) -> bool:
        """Whether it is served elsewhere."""
        return self.url is not None

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter of another model."""
        return self.adapter_of is not None

    @property
    def instance_name(self) -> str:
        """The name of its engine in the ledger: its id, with '-' for what no name may have."""
        name = _NOT_OF_A_NAME.sub("-", self.id)
        if len(name) <= MAX_NAME_LENGTH:
            return name
        digest = hashlib.sha256(self.id.encode()).hexdigest()[:_DIGEST_LENGTH]
        return f"{name[: MAX_NAME_LENGTH - 1 - _DIGEST_LENGTH]}-{digest}"


class Settings(Values):
    """The whole file."""

    GIVEN: ClassVar = frozenset({"path"})

    path: Path
    listen: Listen = Field(
        default="127.0.0.1:8080",
        description="address and port; another than the loopback needs `keys_file`",
    )
    keys_file: Path | None = Field(
        default=None, description="the file of clients' keys; a relative path is one from this file"
    )
    workers: int = Field(
        default=1, ge=1, le=MAX_WORKERS, description="how many processes serve HTTP"
    )
    devices: AllDevices = Field(
        default="all", description="GPUs by number or UUID; `host` for engines on the CPU"
    )
    host_memory_bytes: Annotated[Size, Field(gt=0)] | None = Field(
        default=None,
        validation_alias="host_memory",
        description="host memory of all engines and their copies; half of what is free at first",
    )
    max_starting: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="how many engines start at a time, where they fit; one for each four cores",
    )
    turn_seconds: NotNegative = Field(
        default=10.0,
        validation_alias="turn",
        description="how long a model waits for room that busy ones have until one of them holds "
        "back for it; `0` is for ever",
    )
    engines_on_exit: Literal["stop", "keep"] = Field(
        default="stop", description="what becomes of the engines at the end"
    )
    max_body_bytes: Annotated[Size, Field(gt=0)] = Field(
        default=32 * MIB, validation_alias="max_body", description="the largest body of a request"
    )
    environments: dict[Text, Environment] = Field(
        default_factory=dict, description="the Pythons that have engines (below)"
    )
    classes: dict[Text, ServiceClass] = Field(
        default_factory=dict, description="goals of kinds of requests (below)"
    )
    memory: MemorySettings = Field(
        default=MemorySettings(), description="who may be stopped for another (below)"
    )
    placement: PlacementSettings = Field(
        default=PlacementSettings(), description="who starts where, and moves (below)"
    )
    models: dict[PublicName, ModelSettings] = Field(
        default_factory=dict, description="the models, by their public names (below)"
    )

    @property
    def host(self) -> str:
        """The address to listen on."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port to listen on; 0 is any that is free."""
        return int(self.listen.rpartition(":")[2])

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine can reach it."""
        return is_loopback(self.host)

    @cached_property
    def _by_name(self) -> dict[str, ModelSettings]:
        found = {alias: model for model in self.models.values() for alias in model.aliases}
        return found | self.models

    def resolve(self, name: str) -> ModelSettings | None:
        """Return the model of this name, alias or adapter's name, or None."""
        return self._by_name.get(name)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other values, which are not checked; it resolves its own names."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("_by_name", None)
        return copy
