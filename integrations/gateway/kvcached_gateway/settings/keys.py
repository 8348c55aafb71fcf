"""The keys of clients: hashes in a file of their own, with what each key may do.

    alice: {sha256: 5e88..., models: [llama-8b], class: chat, requests_per_minute: 60}

Finding a key takes the same time whichever it is, and whether there is one.
"""

import asyncio
import hashlib
import hmac
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field, ValidationError

from kvcached_core.errors import ConfigError
from kvcached_gateway.settings.config import Settings
from kvcached_gateway.settings.files import read_own
from kvcached_gateway.settings.mistakes import Mistake, nearest
from kvcached_gateway.settings.mistakes import Path as Place
from kvcached_gateway.settings.tables import Text, Values
from kvcached_gateway.settings.validation import first_mistake, table
from kvcached_gateway.settings.yaml_file import parse_yaml

_log = logging.getLogger(__name__)
LOOK_SECONDS = 1.0
_SCHEME = "bearer"
_DIGEST = frozenset("0123456789abcdef")
_NUM_DIGITS = 64
_Stamp = tuple[int, int, int]


def _digest(text: str) -> str:
    found = text.lower()
    if len(found) != _NUM_DIGITS or not set(found) <= _DIGEST:
        raise ValueError("write the SHA-256 of the key, 64 hexadecimal digits, not the key")
    return found


class Key(Values):
    """One client's key.

    Attributes:
        name: What logs and metrics call it.
        sha256: The SHA-256 of the key, in hexadecimal digits.
    """

    GIVEN: ClassVar = frozenset({"name"})

    name: str
    sha256: Annotated[str, AfterValidator(_digest)] = Field(
        repr=False, description="the SHA-256 of the key, in hexadecimal digits"
    )
    models: tuple[Text, ...] | None = Field(
        default=None,
        description="the models that it may ask, by their names; without it all",
    )
    class_name: Text | None = Field(
        default=None, validation_alias="class", description="the class of its requests"
    )
    max_concurrent: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="how many requests it may have at once"
    )
    requests_per_minute: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="how many it may send a minute"
    )
    may_set_deadline: bool = Field(
        default=False, description="whether its requests may name a class and a deadline"
    )


class Keys:
    """The keys of a file, by their hashes."""

    def __init__(self, keys: tuple[Key, ...]) -> None:
        self.all = keys
        self._by_name = {key.name: key for key in keys}
        self._hashes = tuple((bytes.fromhex(key.sha256), key) for key in keys)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the keys of a file that its user alone may read.

        Raises:
            ConfigError: With the first mistake: file, line, key and what is allowed.
        """
        document = parse_yaml(path, read_own(path, is_secret=True))
        try:
            found = table(document.values, (), None)
            keys = tuple(_key(name, value) for name, value in found.items())
            _check_different(keys)
        except Mistake as mistake:
            raise document.error(mistake) from None
        return cls(keys)

    def find(self, authorization: str | None) -> Key | None:
        """Return the key in a header `Authorization: Bearer KEY`, or None."""
        scheme, _, secret = (authorization or "").partition(" ")
        given = hashlib.sha256(secret.strip().encode(errors="surrogateescape")).digest()
        found = None
        for known, key in self._hashes:  # each of them: how long it takes tells nothing
            if hmac.compare_digest(known, given):
                found = key
        return found if scheme.lower() == _SCHEME else None

    def named(self, name: str) -> Key | None:
        """Return the key of this name; None of one that is gone."""
        return self._by_name.get(name)

    def check(self, settings: Settings) -> None:
        """Refuse keys that name a model or a class that there is not.

        Raises:
            ConfigError: With the first.
        """
        for key in self.all:
            for model in key.models or ():
                if model not in settings.models:
                    near = nearest(model, settings.models)
                    raise ConfigError(f"the key {key.name!r} names no model {model!r}; {near}")
            if key.class_name is not None and key.class_name not in settings.classes:
                near = nearest(key.class_name, settings.classes)
                raise ConfigError(f"the key {key.name!r} names no class {key.class_name!r}; {near}")


class KeysFile:
    """The keys of a file as they are now: it is read again when it changed, or the settings did.

    Args:
        path: The file.
        settings: The settings that hold now: keys name models and classes of theirs.

    Attributes:
        keys: The keys that hold; those from before a mistake, until it is corrected.

    Raises:
        ConfigError: If it has a mistake the first time.
    """

    def __init__(self, path: Path, settings: Callable[[], Settings]) -> None:
        self._path = path
        self._settings = settings
        self._seen = self._look(), settings()
        self.keys = Keys.read(path)
        self.keys.check(settings())

    def named(self, name: str) -> Key | None:
        """Return the key of this name that holds now; None where there is none."""
        return self.keys.named(name)

    async def follow(self) -> None:
        """Look once a second whether it changed, until this is cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await asyncio.to_thread(self.read_again)

    def read_again(self) -> bool:
        """Read it if it may say something else; return whether it did. It blocks for a file."""
        seen = stamp, settings = self._look(), self._settings()
        if stamp == self._seen[0] and settings is self._seen[1]:
            return False
        self._seen = seen
        try:
            keys = Keys.read(self._path)
            keys.check(settings)
        except ConfigError as error:
            _log.error("the keys of before hold on: %s", error)
            return False
        self.keys = keys
        _log.info("read %d keys from %s", len(self.keys.all), self._path)
        return True

    def _look(self) -> _Stamp | None:
        try:
            found = os.stat(self._path)  # noqa: PTH116  as os.open, which follows links as well
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def _key(name: str, written: Any) -> Key:
    here: Place = (name,)
    values = table(written, here, Key.keys())
    silent = set(written or ()) - set(values)
    if "models" in silent:
        raise Mistake((*here, "models"), "says nothing; write [] for none, or leave it out for all")
    try:
        return Key.model_validate({**values, "name": name})
    except ValidationError as error:
        found = first_mistake(error)
        is_secret = found.path[-1:] == ("sha256",)  # somebody may have written the key itself
        if is_secret and "is missing" not in found.text:
            raise Mistake((*here, "sha256"), f"is no hash; {found.text}") from None
        raise Mistake((*here, *found.path), found.text, found.value) from None


def _check_different(keys: tuple[Key, ...]) -> None:
    owners: dict[str, str] = {}
    for key in keys:
        if key.sha256 in owners:
            raise Mistake((key.name, "sha256"), f"is that of {owners[key.sha256]!r}, too")
        owners[key.sha256] = key.name
