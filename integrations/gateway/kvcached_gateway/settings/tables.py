"""What a value of the gateway's files may be, and a table of them."""

import re
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from kvcached_core.units import MAX_SECONDS
from kvcached_gateway.settings.units import Seconds


def _matching(pattern: str, allowed: str) -> AfterValidator:
    compiled = re.compile(pattern, re.ASCII)

    def check(text: str) -> str:
        if not compiled.fullmatch(text):
            raise ValueError(allowed)
        return text

    return AfterValidator(check)


def _check_host(text: str) -> str:
    """Refuse an address whose host no socket can be opened for."""
    host = urlsplit(text if "//" in text else f"//{text}").hostname
    if not host:
        raise ValueError("it needs a host")
    host.encode("idna")  # a `UnicodeError` is a `ValueError`, and says what is wrong
    return text


def _check_port(text: str) -> str:
    parts = urlsplit(text)
    if parts.port == 0 or parts.netloc.endswith(":"):
        raise ValueError("write a port behind the ':', or leave it out")
    return text


def _one_or_list(value: Any) -> Any:
    """Take one name for a list of one."""
    return (value,) if isinstance(value, str) else value


def _all_or_list(value: Any) -> Any:
    if value == "all" or isinstance(value, list | tuple):
        return value
    if isinstance(value, str):
        return (value,)
    raise ValueError("write all, host, or a list of GPU numbers or UUIDs")


PublicName = Annotated[
    str,
    _matching(
        r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}",
        "use letters, digits and . _ : / @ + -, up to 128, starting with a letter or digit",
    ),
]
Listen = Annotated[
    str,
    _matching(r"(\[[^\[\]]+\]|[^:\s\[\]]+):\d{1,5}", "write an address and a port: 127.0.0.1:8080"),
    AfterValidator(_check_host),
]
Url = Annotated[
    str,
    _matching(
        r"https?://[^/?#@\s]+(/[^/?#\s]+)*", "write http:// or https://, a host, a port: no more"
    ),
    AfterValidator(_check_host),
    AfterValidator(_check_port),
]
VariableName = Annotated[
    str, _matching(r"[A-Za-z_][A-Za-z0-9_]*", "write the name of a variable, not its value")
]
Text = Annotated[str, Field(min_length=1)]
NodeLabel = Annotated[
    str,
    _matching(
        r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?(=[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?",
        "write a label as key=value, or a node's name",
    ),
]
Devices = Annotated[tuple[Text, ...], BeforeValidator(_one_or_list)]
Nodes = Annotated[tuple[NodeLabel, ...], BeforeValidator(_one_or_list)]
AllDevices = Annotated[Literal["all"] | tuple[Text, ...], BeforeValidator(_all_or_list)]
Positive = Annotated[Seconds, Field(gt=0, le=MAX_SECONDS)]
NotNegative = Annotated[Seconds, Field(ge=0, le=MAX_SECONDS)]


class Values(BaseModel):
    """A table of the file.

    Attributes:
        GIVEN: Fields that the place in the file says, and no key.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False
    )
    GIVEN: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def keys(cls) -> dict[str, str]:
        """Return the field of each key that the table may have in the file."""
        return {
            field.validation_alias if isinstance(field.validation_alias, str) else name: name
            for name, field in cls.model_fields.items()
            if name not in cls.GIVEN
        }
