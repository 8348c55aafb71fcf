"""An engine with one scheduler, which tells workers in other processes what to map."""

import logging
import weakref
from collections.abc import Callable, Sequence

from kvcached_core.config import Config
from kvcached_core.engine.engine import ElasticEngine
from kvcached_core.engine.instance import Instance
from kvcached_core.engine.placing import Placing, Planes
from kvcached_core.engine.port import EnginePort
from kvcached_core.engine.ranks import Ranks
from kvcached_core.memory.devices import Device
from kvcached_core.memory.seats import Placement


class CentralEngine(ElasticEngine):
    """One such engine in the ledgers of its workers' devices: from its start to its shutdown.

    Args:
        port: The engine.
        config: The settings.
        devices: The device of each rank.
        name: What the instance is called when nobody named it.
        engine: The engine and its release.
        logger: The engine's: it shows no other.
        length_setting: The engine's setting for the longest request.
        data_rank: See `Instance`.

    Raises:
        KVCachedError: As `Instance`.
    """

    def __init__(
        self,
        port: EnginePort,
        config: Config,
        devices: Sequence[Device],
        *,
        name: str,
        engine: str,
        logger: logging.Logger,
        length_setting: str,
        data_rank: int = 0,
    ) -> None:
        self.devices = devices
        self.pools = []  # from here on somebody may ring
        self.instance = Instance(
            devices,
            config,
            default_name=name,
            engine=engine,
            data_rank=data_rank,
            on_ring=_ring_if_there(self),
        )
        super().__init__(Ranks.alone(self.instance, devices[0]), port)
        self.placing = Placing(
            self.ranks, config, devices[0], logger, length_setting=length_setting
        )

    def place_ranks(
        self, planes: Planes, num_planes: Sequence[int], granularity_bytes: int
    ) -> list[Placement]:
        """Choose the geometry; return where the KV cache of each rank lies.

        Args:
            planes: Those of the rank that has most.
            num_planes: How many each rank has.
            granularity_bytes: The devices', in bytes.

        Raises:
            KVCachedError: As `Placing.place`.
        """
        self.geometry = self.placing.place(planes, granularity_bytes)
        return [
            self.placing.placement(self.instance.seat(device), number)
            for device, number in zip(self.devices, num_planes, strict=True)
        ]


def _ring_if_there(engine: CentralEngine) -> Callable[[], None]:
    """Return what rings an engine, and does not keep it."""
    find = weakref.ref(engine)

    def ring() -> None:
        found = find()
        if found is not None:
            found.ring()

    return ring
