"""What nodes say of themselves, and what doors know of them: values that go over Ray's wire."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvcached_gateway.admin.views import DeviceRow, ModelRow
from kvcached_gateway.control.moves import Scene

__all__ = ["Place", "Report", "Rules", "Standing", "Table"]


@dataclass(frozen=True)
class Place:
    """A node's gateway, from its start to its end.

    Attributes:
        id: The node, as Ray names it; one gateway of it runs at a time.
        name: What people call it.
        labels: What `nodes:` of a model may name it by: names, addresses, and `key=value` labels.
        url: Where it takes requests.
        admin_url: Where it is steered.
        token: What either asks for, new at each start.
    """

    id: str
    name: str
    labels: frozenset[str]
    url: str
    admin_url: str
    token: str = field(repr=False)


@dataclass(frozen=True)
class Rules:
    """What the file of models says on a node; the same on all of them, but for a moment.

    Attributes:
        settings: As JSON, without environments.
        keys: Clients' keys as JSON, by their hashes; None where there are none.
    """

    settings: bytes
    keys: bytes | None


@dataclass(frozen=True)
class Report:
    """What a node says of itself.

    Attributes:
        place: The node.
        is_draining: Whether it takes no new requests.
        models: Its models that have an engine, or failed, or are waited for.
        devices: Its devices, and its host's memory.
        scene: What placement sees of it.
        rules: What its file says; None where that has not changed: then models without a place are
            left out of the scene.
    """

    place: Place
    is_draining: bool
    models: tuple[ModelRow, ...]
    devices: tuple[DeviceRow, ...]
    scene: Scene
    rules: Rules | None = None


@dataclass(frozen=True)
class Standing:
    """A node, as doors see it.

    Attributes:
        place: The node.
        joined: Which of all that joined it is; higher after it was given up and came back.
        is_draining: Whether it takes no new requests.
        models: Its models that are not cold, by their names.
        devices: Its devices.
    """

    place: Place
    joined: int
    is_draining: bool = False
    models: Mapping[str, ModelRow] = field(default_factory=dict)
    devices: tuple[DeviceRow, ...] = ()


@dataclass(frozen=True)
class Table:
    """What doors go by.

    Attributes:
        version: It grows with each change.
        rules: What the file says; None before the first node told.
        nodes: Every node.
    """

    version: int = 0
    rules: Rules | None = None
    nodes: tuple[Standing, ...] = ()
