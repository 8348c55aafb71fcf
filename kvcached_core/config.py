"""Every setting, in one place, read from the environment and validated once."""

import difflib
import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from kvcached_core.errors import ConfigError
from kvcached_core.units import (
    DEFAULT_PAGE_BYTES,
    MAX_PRIORITY,
    MAX_SECONDS,
    MIN_PRIORITY,
    check_name,
    default_directory,
    format_bytes,
    parse_bytes,
)

PREFIX = "KVCACHED_"
SWITCH = "ENABLE_KVCACHED"
HOST, CUDA = "host", "cuda"
# Watermarks of idle pages, low and high, where nothing else is set; docs/lab/steps.md has the
# measurements. Pools on the host are small.
DEFAULT_SPARE_PAGES = {HOST: (1, 1), CUDA: (4, 16)}


class Enable(StrEnum):
    """What `ENABLE_KVCACHED` may say."""

    OFF = "0"
    ON = "1"
    AUTO = "auto"


class WeightsMode(StrEnum):
    """What an idle engine does with its weights when a neighbour needs the memory."""

    KEEP = "keep"
    YIELD = "yield"


def _size(name: str, whole_bytes: int | None = None) -> BeforeValidator:
    def parse(value: object) -> object:
        if not isinstance(value, str):
            return value
        num_bytes = parse_bytes(value, what=PREFIX + name, whole_bytes=whole_bytes)
        return value if value.strip().endswith("%") else num_bytes

    return BeforeValidator(parse)


def _size_or_share(name: str) -> BeforeValidator:
    """A size in bytes, or a share that is kept as text until it is known of what."""
    return _size(name, whole_bytes=100)


def _folder(value: object) -> object:
    if isinstance(value, str) and (not value or value.startswith("~")):
        raise PydanticCustomError("folder", "write the path of a folder; '~' is not expanded")
    return value


_Folder = Annotated[Path, BeforeValidator(_folder)]
_Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]


def _in_bytes(value: int | str, name: str, whole_bytes: int) -> int:
    """Return a size in bytes, or what a share of `whole_bytes` is."""
    if isinstance(value, str):
        return parse_bytes(value, what=PREFIX + name, whole_bytes=whole_bytes)
    return value


# What people write for the default of a variable.
_WORDS = {
    **dict.fromkeys(("limit", "floor", "weights_disk", "sleep_after"), "none"),
    "weights_kept_seconds": "auto",
}


class Config(BaseModel):
    """The settings of one instance. Each field is the variable `KVCACHED_<FIELD>`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    dir: _Folder = Field(default_factory=default_directory, description="folder of ledgers, 0700")
    name: str | None = Field(
        default=None, description="the instance's name; letters, digits, '.', '_', '-', up to 64"
    )
    host_pool: Annotated[Annotated[int, Field(gt=0)] | str, _size_or_share("HOST_POOL")] = Field(
        default="50%",
        description="host backend: bytes that all engines share, a size or a share of what a "
        "process may use; the same for every engine",
    )
    limit: Annotated[int | str | None, _size_or_share("LIMIT")] = Field(
        default=None, description="ceiling of this instance: a size, a share of the pool, or 'none'"
    )
    floor: Annotated[int | str, _size_or_share("FLOOR")] = Field(
        default=0,
        description="what this instance can always get back: a size, a share, or 'none'",
    )
    priority: int = Field(
        default=0,
        ge=MIN_PRIORITY,
        le=MAX_PRIORITY,
        description="instances with a lower value give up cached blocks first",
    )
    headroom: Annotated[int | str, _size_or_share("HEADROOM")] = Field(
        default="2%",
        description="GPU: bytes of the device that KV caches leave free, a size or a share",
    )
    page_bytes: Annotated[int, _size("PAGE_BYTES")] = Field(
        default=DEFAULT_PAGE_BYTES,
        ge=4096,
        description="page size to aim at; the real one is a multiple of the granularity near it",
    )
    min_spare_pages: int | None = Field(
        default=None,
        ge=0,
        description="while requests run and fewer pages are idle, more are mapped ahead ...",
    )
    max_spare_pages: int | None = Field(
        default=None, ge=0, description="... until so many are idle; what is above goes back"
    )
    idle_seconds: _Seconds = Field(
        default=1.0, description="how long a page stays idle before it goes back"
    )
    weights: WeightsMode = Field(
        default=WeightsMode.KEEP, description="whether an idle engine yields its weights, too"
    )
    buffers: WeightsMode = Field(
        default=WeightsMode.KEEP,
        description="whether large buffers and the memory of CUDA graphs go with the weights",
    )
    weights_dir: _Folder | None = Field(
        default=None, description="folder of the host copies of weights; none is one in the other"
    )
    weights_restart: bool = Field(
        default=True,
        description="whether a start has its weights from the host copy of an earlier one, if that "
        "is what would be read from the model's files",
    )
    weights_replicas: bool = Field(
        default=False, description="whether weights come from replicas on this host, and go to them"
    )
    weights_disk: _Folder | None = Field(
        default=None,
        description="folder on a disk for images of weights that the host budget has no room for; "
        "none keeps them in host memory alone",
    )
    weights_disk_free: Annotated[int | str, _size_or_share("WEIGHTS_DISK_FREE")] = Field(
        default="10%",
        description="what such images leave free of that disk: a size, or a share of all of it",
    )
    weights_wait: Literal["all", "layers"] = Field(
        default="all",
        description="what a step waits for when weights come back: all, or each layer for its own",
    )
    weights_kept_seconds: _Seconds | None = Field(
        default=None,
        description="how long weights that were activated are kept, whoever asks, but for higher "
        "priorities; 'auto' is ten seconds, or 30 times what the activation took",
    )
    host_budget: Annotated[int | str, _size_or_share("HOST_BUDGET")] = Field(
        default="50%",
        description="host memory for all copies of weights and all offloaded caches: a size, or a "
        "share of what a process may use",
    )
    sleep_after: _Seconds | None = Field(
        default=None,
        description="seconds after which an idle engine yields its weights and its cache unasked",
    )
    debug: bool = Field(
        default=False, description="check before each step that every block it names is mapped"
    )

    def spare_pages(self, device: str) -> tuple[int, int]:
        """Return the low and the high watermark of idle pages on a `device`."""
        low, high = DEFAULT_SPARE_PAGES[device]
        if self.min_spare_pages is not None:
            low, high = self.min_spare_pages, max(high, self.min_spare_pages)
        if self.max_spare_pages is not None:
            low, high = min(low, self.max_spare_pages), self.max_spare_pages
        return low, high

    def host_pool_bytes(self, usable_bytes: int) -> int:
        """Return the bytes that all engines on the host share; a share is one of `usable_bytes`.

        Raises:
            ConfigError: If it is nothing.
        """
        pool_bytes = _in_bytes(self.host_pool, "HOST_POOL", usable_bytes)
        if not pool_bytes:
            raise ConfigError(
                f"{PREFIX}HOST_POOL={self.host_pool!r} is not allowed; it must be more than 0"
            )
        return pool_bytes

    @property
    def copies_dir(self) -> Path:
        """The folder of the host copies of weights."""
        return self.dir / "weights" if self.weights_dir is None else self.weights_dir

    def host_budget_bytes(self, usable_bytes: int) -> int:
        """Return what our copies in host memory may take; a share is one of `usable_bytes`."""
        return _in_bytes(self.host_budget, "HOST_BUDGET", usable_bytes)

    def weights_disk_free_bytes(self, disk_bytes: int) -> int:
        """Return what images leave free of a file system of `disk_bytes`."""
        return _in_bytes(self.weights_disk_free, "WEIGHTS_DISK_FREE", disk_bytes)

    def headroom_bytes(self, device_bytes: int) -> int:
        """Return the bytes of a device of `device_bytes` that KV caches leave free."""
        return _in_bytes(self.headroom, "HEADROOM", device_bytes)

    def limit_bytes(self, pool_bytes: int) -> int | None:
        """Return the limit in bytes, or None; a share is one of `pool_bytes`.

        Raises:
            ConfigError: If it is above the pool.
        """
        if self.limit is None:
            return None
        limit = _in_bytes(self.limit, "LIMIT", pool_bytes)
        if limit > pool_bytes:
            raise ConfigError(
                f"{PREFIX}LIMIT={format_bytes(limit)} is above what all instances share, "
                f"{format_bytes(pool_bytes)}; it must not be"
            )
        return limit

    def floor_bytes(self, pool_bytes: int) -> int:
        """Return the floor in bytes; a share is one of `pool_bytes`."""
        return _in_bytes(self.floor, "FLOOR", pool_bytes)

    def virtual_bytes(self, pool_bytes: int) -> int:
        """Return what the engine may believe it has: the pool, or the limit if that is less."""
        limit = self.limit_bytes(pool_bytes)
        return pool_bytes if limit is None else limit


def read_switch(environ: Mapping[str, str] = os.environ) -> Enable:
    """Return what `ENABLE_KVCACHED` says; not set means off.

    Raises:
        ConfigError: If it says something else.
    """
    value = environ.get(SWITCH, "0").strip().lower() or "0"
    try:
        return Enable(value)
    except ValueError:
        raise ConfigError(f"{SWITCH}={value!r} is not allowed; use 0, 1 or auto") from None


def read_config(environ: Mapping[str, str] = os.environ) -> Config:
    """Return the settings in `environ`.

    Raises:
        ConfigError: If a variable is unknown or its value is not allowed; the message names it.
    """
    values: dict[str, Any] = {}
    for variable, value in environ.items():
        if not variable.startswith(PREFIX):
            continue
        field = variable.removeprefix(PREFIX).lower()
        if field not in Config.model_fields:
            known = [PREFIX + name.upper() for name in Config.model_fields]
            near = difflib.get_close_matches(variable, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{variable} is not a setting; {hint}")
        if value.strip().lower() != _WORDS.get(field):
            values[field] = value
    try:
        config = Config(**values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    if config.name is not None:
        check_name(config.name, PREFIX + "NAME")
    low, high = config.min_spare_pages, config.max_spare_pages
    if low is not None and high is not None and high < low:
        raise ConfigError(
            f"{PREFIX}MAX_SPARE_PAGES={high} is below {PREFIX}MIN_SPARE_PAGES={low}; it must not be"
        )
    return config


def _explain(error: ValidationError) -> str:
    problem = error.errors()[0]
    field = str(problem["loc"][0])
    text = f"{PREFIX}{field.upper()}={problem['input']!r} is not allowed: {problem['msg']}"
    if isinstance(problem.get("ctx", {}).get("error"), ConfigError):
        text = str(problem["ctx"]["error"])
    return f"{text}, or {_WORDS[field]}" if field in _WORDS else text
