"""A worker's weights on memory of ours: taken over once they are loaded, and kept up with."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from kvcached_core.config import Config
from kvcached_core.memory.torch_device import (
    current_stream,
    find_device,
    make_backend,
    make_sharing_backend,
)
from kvcached_core.weights.adopting import Adopted, adopt
from kvcached_core.weights.binding import Modules
from kvcached_core.weights.budgets import make_budget
from kvcached_core.weights.host_copy import HostCopy
from kvcached_core.weights.key import Origin, copy_key
from kvcached_core.weights.open_copy import open_copy
from kvcached_core.weights.own_annex import OwnAnnex
from kvcached_core.weights.rank import RankWeights
from kvcached_core.weights.replicas import Replicas
from kvcached_core.weights.restart import Restart
from kvcached_core.weights.stages import Points, Stages, find_stages
from kvcached_core.weights.walks import Walks


class OwnWeights:
    """The weights of a worker on memory of ours, all of which is resident at first.

    Attributes:
        walks: How steps run while weights arrive; None if they wait for all of them.

    Args:
        adopted: What was taken over.
        rank: The image, its copy on the host, and their part of the ledger.
        annex: What goes with the weights; None if nothing does.
        restart: How the model was loaded, where a copy may have its weights.
    """

    def __init__(
        self,
        adopted: Adopted,
        rank: RankWeights,
        annex: OwnAnnex | None = None,
        restart: Restart | None = None,
    ) -> None:
        self.adopted = adopted
        self.rank = rank
        self.annex = annex
        self.walks: Walks | None = None
        self._restart = restart
        self._may_move = True

    @property
    def num_bytes(self) -> int:
        """What their pages take of the device, in bytes."""
        return self.adopted.image.layout.num_bytes

    def follow(self, *, is_update: bool, is_captured: bool = False) -> None:
        """Take over what the engine put in the place of weights, while all pages are there.

        Args:
            is_update: All weights were written, so all are copied again before they are given.
            is_captured: Graphs have the addresses of weights as they are now: what is not in its
                place stays where it is, from now on.
        """
        self._may_move = self._may_move and not is_captured
        if (self._may_move and self.adopted.follow()) or is_update:
            self.rank.mark_dirty()

    def end_start(self) -> None:
        """Let what is in the annex go with them: the engine is ready, and has captured its graphs.

        Call it before anybody is told how much there is of the weights.
        """
        if self.annex is not None:
            self.annex.prepare()
            self.rank.add_annex(self.annex.annex)

    def stages(self) -> Stages:
        """Return which pages each part of the model needs."""
        return find_stages(self.adopted.modules, self.adopted.image)

    def walk(self, points: Points) -> None:
        """Let each part of a step wait for its own pages from now on.

        Args:
            points: What a forward waits for, and where.
        """
        self.rank.lets_arrive = True
        self.walks = Walks(self.rank.arriving, points)

    def close(self) -> None:
        """Give everything back; no tensor of the model may be used any more."""
        with ExitStack() as rest:
            if self.annex is not None:
                rest.callback(self.annex.close)
            if self._restart is not None:
                rest.callback(self._restart.close)
            self.rank.close()


def take_over(
    modules: Modules,
    device: Any,
    config: Config,
    origin_of: Callable[[str], Origin],
    annex: OwnAnnex | None = None,
    *,
    restart: Restart | None = None,
) -> OwnWeights | None:
    """Move a loaded model's weights to memory of ours: before anything is captured or sized.

    Beside the weights, it needs a little more than a GiB of the device while it runs.

    Args:
        modules: The model, then what belongs to it, a drafter for example, each with its name.
        device: Where they lie, as torch names it.
        config: The settings.
        origin_of: Returns what decides the weights' bytes, with the digest of their layout.
        annex: What goes with the weights.
        restart: How the model was loaded, where a copy may have its weights.

    Returns:
        None if nothing can be moved; a line in the log says why.

    Raises:
        BackendError: If there is no memory for a page. Some weights have moved then.
    """
    replicas = None
    backend = make_backend(device)
    if config.weights_replicas:
        backend = sharing = make_sharing_backend(device)
        replicas = Replicas(sharing, config.copies_dir)
    adopted = adopt(modules, backend)
    if adopted is None:
        if restart is not None:
            restart.close()
        return None
    layout, budget = adopted.image.layout, make_budget(config)
    key = copy_key((origin_of if restart is None else restart.origin_of)(layout.digest))
    cpus = find_device(device, config).near_cpus()
    loaded = None if restart is None else restart.loaded_as(layout.digest)

    def make_copy(stop: threading.Event) -> HostCopy | None:
        kept = None if restart is None else restart.take_copy(key.digest)
        if kept is not None:
            return kept
        return open_copy(config, key, layout, budget, stop=stop, cpus=cpus, loaded=loaded)

    rank = RankWeights(adopted.image, make_copy, current_stream(device), replicas)
    return OwnWeights(adopted, rank, annex, restart)
