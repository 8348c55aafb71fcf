"""Every setting, in one place, read from the environment and validated once."""

import difflib
import os
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kvcached_core.errors import ConfigError
from kvcached_core.geometry import DEFAULT_PAGE_BYTES
from kvcached_core.units import format_bytes, parse_bytes

PREFIX = "KVCACHED_"
SWITCH = "ENABLE_KVCACHED"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Enable(StrEnum):
    """What `ENABLE_KVCACHED` may say."""

    OFF = "0"
    ON = "1"
    AUTO = "auto"


def host_memory_bytes() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def default_directory() -> Path:
    """Return the folder of the ledgers when nothing else is set."""
    return Path(f"/dev/shm/kvcached-{os.geteuid()}")  # noqa: S108  made 0700 and checked on open


def _size(name: str, whole_bytes: int | None = None) -> BeforeValidator:
    def parse(value: object) -> object:
        if isinstance(value, str):
            return parse_bytes(value, what=PREFIX + name, whole_bytes=whole_bytes)
        return value

    return BeforeValidator(parse)


def _limit(value: object) -> object:
    if value == "none":
        return None
    if isinstance(value, str) and not value.endswith("%"):
        return parse_bytes(value, what=PREFIX + "LIMIT")
    return value


class Config(BaseModel):
    """The settings of one instance. Each field is the variable `KVCACHED_<FIELD>`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    dir: Path = Field(default_factory=default_directory, description="folder of ledgers, 0700")
    name: str | None = Field(
        default=None, description="the instance's name; letters, digits, '.', '_', '-', up to 64"
    )
    host_pool: Annotated[int, _size("HOST_POOL", host_memory_bytes())] = Field(
        default_factory=lambda: host_memory_bytes() // 2,
        gt=0,
        description="host backend: bytes that all engines share; the same for every engine",
    )
    limit: Annotated[int | str | None, BeforeValidator(_limit)] = Field(
        default=None, description="ceiling of this instance: a size, a share of the pool, or 'none'"
    )
    page_bytes: Annotated[int, _size("PAGE_BYTES")] = Field(
        default=DEFAULT_PAGE_BYTES,
        ge=4096,
        description="page size to aim at; the real one is a multiple of the granularity near it",
    )
    min_spare_pages: int = Field(
        default=1, ge=0, description="idle pages mapped ahead of need while requests run"
    )
    max_spare_pages: int = Field(
        default=1, ge=0, description="idle pages kept; what is above it is unmapped"
    )
    idle_seconds: float = Field(
        default=2.0,
        ge=0,
        description="how long idle pages above the spare ones stay mapped while requests run",
    )
    debug: bool = Field(
        default=False, description="check before each step that every block it names is mapped"
    )

    @property
    def limit_bytes(self) -> int | None:
        """The limit in bytes, or None; a share is one of the host pool."""
        if isinstance(self.limit, str):
            return parse_bytes(self.limit, what=PREFIX + "LIMIT", whole_bytes=self.host_pool)
        return self.limit

    @property
    def virtual_bytes(self) -> int:
        """What the engine may believe it has: the pool, or the limit if that is less."""
        limit = self.limit_bytes
        return self.host_pool if limit is None else min(limit, self.host_pool)


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
        values[field] = value
    try:
        config = Config(**values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    if config.name is not None and not _NAME.fullmatch(config.name):
        raise ConfigError(
            f"{PREFIX}NAME={config.name!r} is not allowed; use letters, digits, '.', '_' and '-', "
            "up to 64, starting with a letter or digit"
        )
    if config.max_spare_pages < config.min_spare_pages:
        raise ConfigError(
            f"{PREFIX}MAX_SPARE_PAGES={config.max_spare_pages} is below "
            f"{PREFIX}MIN_SPARE_PAGES={config.min_spare_pages}; it must not be"
        )
    limit_bytes = config.limit_bytes
    if limit_bytes is not None and limit_bytes > config.host_pool:
        raise ConfigError(
            f"{PREFIX}LIMIT={format_bytes(limit_bytes)} is above "
            f"{PREFIX}HOST_POOL={format_bytes(config.host_pool)}; it must not be"
        )
    return config


def _explain(error: ValidationError) -> str:
    problem = error.errors()[0]
    variable = PREFIX + str(problem["loc"][0]).upper()
    if isinstance(problem.get("ctx", {}).get("error"), ConfigError):
        return str(problem["ctx"]["error"])
    return f"{variable}={problem['input']!r} is not allowed: {problem['msg']}"
