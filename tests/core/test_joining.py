"""Several ranks of one server: what rank 0 sees, all of them are told, its failure included."""

from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from kvcached_core.config import Config, read_config
from kvcached_core.engine.instance import Instance
from kvcached_core.engine.joining import Group, join_ranks
from kvcached_core.engine.ranks import Ranks
from kvcached_core.errors import ConfigError, FirstRankError
from kvcached_core.memory.devices import host_device


class Channel:
    """What two ranks say to each other, one after the other: rank 0 first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[Any] = []
        self.rank = 0
        monkeypatch.setattr(distributed, "all_gather_object", self.gather)
        monkeypatch.setattr(distributed, "broadcast_object_list", self.tell)

    def gather(self, found: list[Any], value: Any, **_: Any) -> None:
        found[:] = [value] * len(found)

    def tell(self, values: list[Any], **_: Any) -> None:
        if self.rank == 0:
            self.said = list(values)
        values[:] = self.said

    def join(self, rank: int, config: Config) -> Ranks:
        self.rank = rank
        return join_ranks(
            host_device(config),
            Group(rank, [0, 1]),
            lambda devices: Instance(
                devices,
                config,
                name=None,
                default_name="m",
                engine="test",
                on_ring=lambda: None,
            ),
        )


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> Channel:
    return Channel(monkeypatch)


def test_every_rank_gets_its_seat_from_the_first(channel: Channel, tmp_path: Path) -> None:
    config = read_config({"KVCACHED_DIR": str(tmp_path)})
    first, second = channel.join(0, config), channel.join(1, config)
    assert second.seat == first.seat
    assert second.seat.num_ranks == 2
    assert second.instance is None
    first.close()


def test_a_failure_of_the_first_rank_reaches_the_others(channel: Channel, tmp_path: Path) -> None:
    config = read_config({"KVCACHED_DIR": str(tmp_path), "KVCACHED_HOST_POOL": "1GiB"})
    config = config.model_copy(update={"limit": 2 << 30})
    with pytest.raises(ConfigError, match="is above what all instances share"):
        channel.join(0, config)
    with pytest.raises(FirstRankError, match=r"rank 0 could not start: .*is above what all"):
        channel.join(1, config)
