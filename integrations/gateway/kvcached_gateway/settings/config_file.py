"""Reading the file of models: one clear error for each mistake, with the line that it stands in."""

import os
import re
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from kvcached_core.errors import ConfigError
from kvcached_gateway.settings.config import (
    Environment,
    KvSettings,
    MemorySettings,
    ModelSettings,
    PlacementSettings,
    ServiceClass,
    Settings,
)
from kvcached_gateway.settings.config_checks import FIELD_KEYS, check, fields_of_kind
from kvcached_gateway.settings.files import read_own
from kvcached_gateway.settings.mistakes import NOTHING, Mistake, Path
from kvcached_gateway.settings.tables import Values
from kvcached_gateway.settings.validation import mistakes, table
from kvcached_gateway.settings.yaml_file import Document, parse_yaml

_TABLES: dict[str, type[Values]] = {"memory": MemorySettings, "placement": PlacementSettings}
_NAMED_TABLES: dict[str, type[Values]] = {
    "environments": Environment,
    "classes": ServiceClass,
    "models": ModelSettings,
}
_OF_ONE_MODEL = frozenset(
    {"model", "revision", "aliases", "warm_with", "url", "key_env", "adapter_of", "path"}
)
DEFAULT_KEYS = frozenset(ModelSettings.keys()) - _OF_ONE_MODEL
_TOP_KEYS = (*Settings.keys(), "defaults")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_LOCAL_PATH = re.compile(r"~(?:/|$)|\.{1,2}(?:/|$)")


def read_settings(path: FilePath, environ: Mapping[str, str] = os.environ) -> Settings:
    """Return what a file of models says.

    Args:
        path: The file; it has to belong to the user or to root, and nobody else may write it.
        environ: The gateway's own variables, for `${NAME}` and `key_env`.

    Raises:
        ConfigError: With the first mistake: file, line, key, value, and what is allowed.
    """
    path = absolute(path, FilePath.cwd())
    document = parse_yaml(path, read_own(path))
    try:
        values = _with_defaults(document)
        _expand(document.values, values, environ)
        settings = Settings.model_validate({**values, "path": path})
        check(settings, environ)
    except Mistake as mistake:
        raise document.error(_placed(mistake, document)) from None
    except ValidationError as error:
        raise _first(error, document) from None
    return _with_paths(settings)


def absolute(path: FilePath, folder: FilePath) -> FilePath:
    """Return a path as one from `folder`; links stay, an environment's Python may be one."""
    return FilePath(os.path.normpath(folder / path.expanduser()))  # keeps links


def _with_defaults(document: Document) -> dict[str, Any]:
    """Return the file's values with `defaults` in each model, for the keys that there are."""
    top = table(document.values, (), _TOP_KEYS)
    for name, kind in _TABLES.items():
        if name in top:
            top[name] = table(top[name], (name,), kind.keys())
    for name, kind in _NAMED_TABLES.items():
        if name not in top:
            continue
        top[name] = {
            key: table(value, (name, key), kind.keys())
            | ({"id": key} if kind is ModelSettings else {"name": key})
            for key, value in table(top[name], (name,), None).items()
        }
    defaults = table(top.pop("defaults", None), ("defaults",), DEFAULT_KEYS)
    _check_kv_keys(defaults, ("defaults",))
    for model_id, model in top.get("models", {}).items():
        _check_kv_keys(model, ("models", model_id))
        allowed = {FIELD_KEYS[field] for field in fields_of_kind(model)}
        given = {key: value for key, value in defaults.items() if key in allowed}
        kv = {**given.get("kv", {}), **model.get("kv", {})}
        top["models"][model_id] = {**given, **model, **({"kv": kv} if kv else {})}
    return top


def _check_kv_keys(model: dict[str, Any], here: Path) -> None:
    if "kv" in model:
        model["kv"] = table(model["kv"], (*here, "kv"), KvSettings.keys())


def _expand(raw: Any, values: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Put variables into what environments give their engines; nobody else may name any."""
    for name, environment in values.get("environments", {}).items():
        here: Path = ("environments", name, "env")
        env = table(environment.get("env"), here, None)
        environment["env"] = {
            key: _expanded(value, (*here, key), environ) for key, value in env.items()
        }
    _refuse_variables(raw, ())


def _expanded(value: Any, here: Path, environ: Mapping[str, str]) -> str:
    if not here[-1] or "=" in str(here[-1]):
        raise Mistake(here, "is no name of a variable; use one without '='")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Mistake(here, "has to be text")

    def variable(match: re.Match[str]) -> str:
        if match[1] not in environ:
            raise Mistake(here, f"names the variable {match[1]!r}, which is not set")
        return environ[match[1]]

    if "${" in _VARIABLE.sub("", value):
        raise Mistake(here, "has a '${' that is not of the form ${NAME}")
    return _VARIABLE.sub(variable, value)


def _refuse_variables(raw: Any, here: Path) -> None:
    if here[:1] == ("environments",) and here[2:3] == ("env",):
        return
    if isinstance(raw, dict):
        for key, value in raw.items():
            _refuse_variables(value, (*here, key))
    elif isinstance(raw, list):
        for place, value in enumerate(raw):
            _refuse_variables(value, (*here, place))
    elif isinstance(raw, str) and "${" in raw:
        raise Mistake(here, "variables stand only in an environment's `env`", raw)


def _with_paths(settings: Settings) -> Settings:
    """Return settings whose relative paths begin at the file's folder."""
    folder = settings.path.parent

    def local(text: str | None) -> str | None:
        return str(absolute(FilePath(text), folder)) if text and _LOCAL_PATH.match(text) else text

    return settings.model_copy(
        update={
            "keys_file": settings.keys_file and absolute(settings.keys_file, folder),
            "environments": {
                name: found.model_copy(update={"python": absolute(found.python, folder)})
                for name, found in settings.environments.items()
            },
            "models": {
                name: found.model_copy(
                    update={"model": local(found.model), "path": local(found.path)}
                )
                for name, found in settings.models.items()
            },
        }
    )


def _first(error: ValidationError, document: Document) -> ConfigError:
    """Return the error that says the first mistake in the file."""
    found = [_placed(each, document) for each in mistakes(error)]
    return document.error(min(found, key=lambda mistake: _line(mistake, document)))


def _line(mistake: Mistake, document: Document) -> int:
    path = mistake.path
    while path and path not in document.lines:
        path = path[:-1]
    return document.lines.get(path, 0)


def _placed(mistake: Mistake, document: Document) -> Mistake:
    """Return a mistake with a path of the file: without pydantic's branches, or in `defaults`."""
    path = mistake.path
    known: Path = ()
    for part in path:
        known = (*known, part) if document.has((*known, part)) else known
    if path[:1] == ("models",) and len(known) <= 2 < len(path):  # noqa: PLR2004  a model and its key
        default: Path = ("defaults", *path[2:])
        while len(default) > 1 and not document.has(default):
            default = default[:-1]
        if len(default) > 1:
            return Mistake(default, mistake.text, mistake.value)
    if mistake.value is NOTHING:
        return mistake  # it is about a key that may be missing
    return Mistake(known or path, mistake.text, mistake.value)
