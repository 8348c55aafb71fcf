"""A start that has its weights from the host copy of an earlier one: no file of them is read.

The engine makes the model with made-up weights, which the copy's take the place of. All that the
earlier start noted of its model is compared before that is trusted; where anything differs, the
engine loads the files, as without a copy.
"""

import ctypes
import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvcached_core.config import Config
from kvcached_core.errors import KVCachedError
from kvcached_core.memory.torch_device import (
    current_stream,
    find_device,
    make_backend,
    release_cached_blocks,
)
from kvcached_core.units import format_bytes
from kvcached_core.weights.binding import Group
from kvcached_core.weights.budgets import make_budget
from kvcached_core.weights.fingerprints import Beside, content_of, fingerprint
from kvcached_core.weights.host_copy import HostCopy
from kvcached_core.weights.key import Loaded, Origin, origin_digest, short_name
from kvcached_core.weights.layout import Layout, lay_out
from kvcached_core.weights.open_copy import open_kept
from kvcached_core.weights.stages import in_image_order

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("kvcached")

ROOT = "model"


class Restart:
    """The loading of one rank's model, from a host copy where there is one that can be trusted.

    Attributes:
        loaded: What the model is, once it is loaded; None if nobody can say.
        copy: The host copy that it has its weights from; None if it has not. Whoever takes it
            closes it.

    Args:
        config: The settings.
        device: Where the model goes, as torch names it.
        origin_of: Returns what decides the weights' bytes, with the digest of their layout.
        packages: Names of the engine's modules whose objects a model keeps numbers and tensors in.
    """

    def __init__(
        self,
        config: Config,
        device: Any,
        origin_of: Callable[[str], Origin],
        packages: Collection[str],
    ) -> None:
        self.loaded: Loaded | None = None
        self.copy: HostCopy | None = None
        self._config, self._device = config, device
        self._look, self._packages = origin_of, packages
        self._origin: Origin | None = None

    def load(
        self,
        make_up: Callable[[], "torch.nn.Module"],
        read: Callable[[], "torch.nn.Module"],
        undo: Callable[[], None],
    ) -> "torch.nn.Module":
        """Return the engine's model, all of whose weights are there.

        Args:
            make_up: Returns the model with any weights; it reads no file of them.
            read: Returns it as the engine does by itself.
            undo: Called between the two, where the first one was for nothing.
        """
        origin = self.origin_of("")
        kept = self._open(origin) if origin.files else None  # made-up weights are no quicker so
        if kept is not None:
            copy, loaded = kept
            model, doubt = self._restored(make_up, copy, loaded)
            if not doubt and model is not None:
                self.copy, self.loaded = copy, loaded
                logger.info(
                    "kvcached: %s of weights of %s are those of its host copy; no file was read",
                    format_bytes(copy.num_bytes),
                    short_name(origin.model),
                )
                return model
            logger.warning(
                "kvcached: the weights of %s are read from their files, not from the host copy: %s",
                short_name(origin.model),
                doubt,
            )
            del model
            copy.distrust()
            copy.close()
            undo()
            release_cached_blocks()
        model = read()
        if self.origin_of("").files:
            self.loaded = self._describe(model)
        return model

    def loaded_as(self, layout_digest: str) -> Loaded | None:
        """Return what a copy of an image shall say of the model, if that is laid out like it."""
        loaded = self.loaded
        return loaded if loaded is not None and loaded.layout_digest == layout_digest else None

    def origin_of(self, layout_digest: str) -> Origin:
        """Return what decides the weights' bytes; a model's files are looked at once.

        Where there are none they are looked at again: an engine may fetch them while it loads.
        """
        if self._origin is None or not self._origin.files:
            self._origin = self._look("")
        return replace(self._origin, layout_digest=layout_digest)

    def take_copy(self, digest: str) -> HostCopy | None:
        """Return the copy, once, if it is that of the image with this key; else close it."""
        copy, self.copy = self.copy, None
        if copy is not None and copy.digest != digest:
            copy.close()
            return None
        return copy

    def close(self) -> None:
        """Close the copy if nobody took it."""
        self.take_copy("")

    def _restored(
        self, make_up: Callable[[], "torch.nn.Module"], copy: HostCopy, loaded: Loaded
    ) -> tuple["torch.nn.Module | None", str]:
        """Return a model with the copy's weights, and why it must not be used, if so."""
        try:
            model = make_up()
            groups, layout = self._lay_out(model)
            if layout.digest != loaded.layout_digest:
                return model, "without them this model is laid out otherwise"
            self._copy_in(copy, layout, groups)
            pieces = [fingerprint(content_of(group)) for group in groups]
            if pieces != list(loaded.pieces):
                return model, "they are not what was loaded then"
            differing = Beside({ROOT: model}, groups, self._packages).become(loaded.beside)
        except Exception as error:  # noqa: BLE001  whatever an engine raises, it can load its files
            return None, f"{type(error).__name__}: {error}"
        return model, f"{differing} differs" if differing else ""

    def _describe(self, model: "torch.nn.Module") -> Loaded | None:
        try:
            groups, layout = self._lay_out(model)
            beside = Beside({ROOT: model}, groups, self._packages).found
            pieces = [fingerprint(content_of(group)) for group in groups]
        except (KVCachedError, RuntimeError, NotImplementedError) as error:
            logger.info("kvcached: a restart will read the model's files: %s", error)
            return None
        return Loaded(origin_digest(self.origin_of("")), layout.digest, pieces, beside)

    def _lay_out(self, model: "torch.nn.Module") -> tuple[list[Group], Layout]:
        groups = in_image_order({ROOT: model})
        sizes = [(group.name, group.num_bytes) for group in groups]
        return groups, lay_out(sizes, make_backend(self._device).granularity_bytes)

    def _copy_in(self, copy: HostCopy, layout: Layout, groups: Collection[Group]) -> None:
        """Let the copy's bytes take the place of what is in the weights, where these are now."""
        import torch  # noqa: PLC0415  the core needs torch nowhere else

        backend = make_backend(self._device)
        copy.pin(backend, threading.Event())
        try:
            for piece, group in zip(layout.pieces, groups, strict=True):
                content, begin = content_of(group), piece.offset_bytes
                while begin < piece.end_bytes:
                    page, within = divmod(begin, layout.page_bytes)
                    size = min(piece.end_bytes - begin, layout.page_bytes - within)
                    there = (ctypes.c_char * size).from_address(copy.page_address(page) + within)
                    first = begin - piece.offset_bytes
                    kept = torch.frombuffer(there, dtype=torch.int8)
                    content[first : first + size].copy_(kept, non_blocking=True)
                    begin += size
        finally:
            backend.fence(current_stream(self._device)()).wait()

    def _open(self, origin: Origin) -> tuple[HostCopy, Loaded] | None:
        cpus = find_device(self._device, self._config).near_cpus()
        return open_kept(self._config, origin_digest(origin), make_budget(self._config), cpus)


def make_restart(
    config: Config,
    device: Any,
    origin_of: Callable[[str], Origin],
    packages: Collection[str],
) -> Restart | None:
    """Return the loading of a model, or None where it is the engine's alone."""
    if not config.weights_restart:
        return None
    return Restart(config, device, origin_of, packages)
