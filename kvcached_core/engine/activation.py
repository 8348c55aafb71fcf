"""Weights of an engine that come and go: given while nothing runs, and back before a step runs."""

import logging
import time
from collections.abc import Callable, Sequence

from kvcached_core.config import Config
from kvcached_core.engine.beside import Turn
from kvcached_core.engine.port import EnginePort
from kvcached_core.engine.ranks import Ranks
from kvcached_core.engine.waiting import REFUSAL_SECONDS
from kvcached_core.engine.weights_kept import WeightsKept
from kvcached_core.errors import NoRoomError
from kvcached_core.ledger.shortage import PATIENCE_SECONDS
from kvcached_core.ledger.weights import WeightsWish
from kvcached_core.units import format_bytes
from kvcached_core.weights.status import WeightStatus

logger = logging.getLogger("kvcached")

# How soon an idle engine looks again whether host memory has its weights; each time twice as long,
# up to the second: for want of room there it may never have them.
FIRST_LOOK_SECONDS = 0.25
LAST_LOOK_SECONDS = 8.0

# Who waits for its turn keeps others waiting. If its loop comes no more, because it was paused, its
# bell brings it back after the first of these; the second is how often it puts that off.
ALARM_SECONDS = 0.25
ALARM_AGAIN_SECONDS = 0.05

# For how long requests of an engine may find no memory while nothing of it runs; then it goes back
# into the line of those that wake. Two that have their weights, and no room beside them, would wait
# for each other.
STALL_SECONDS = 1.0


class Activation(WeightsKept):
    """Offers weights to neighbours while nothing runs, and has them back for the next request.

    The scheduler's thread calls it; all ranks that schedule alike call it alike.

    Args:
        ranks: The engine in the ledgers.
        port: The engine.
        status: What there is of the weights of all ranks.
        config: The settings.
        empty: Gives the engine's KV cache and its weights, for who sleeps by the clock or by wish.
    """

    def __init__(
        self,
        ranks: Ranks,
        port: EnginePort,
        status: WeightStatus,
        config: Config,
        empty: Callable[[], None],
    ) -> None:
        self.is_active = True
        self._ranks = ranks
        self._port = port
        self._status = status
        self._sleep_after = config.sleep_after
        self._empty = empty
        self._do_layers_wait, self._is_arriving = config.weights_wait == "layers", False
        self._offered: Sequence[int] = ()  # bytes of each rank, if there are any
        self._is_kept = False  # only higher priorities get them for a while
        self._refused_at = self._stalled_since = 0.0
        self._stalled_bytes = 0  # of its KV cache, which it waits for together with its weights
        self._waking_since_ns = 0  # 0 while it does not wake
        self._idle_since = 0.0
        self._wish = WeightsWish.NONE
        self._has_slept = False  # since it was active last
        self._is_stuck = False  # since then: pages stayed that were to go
        self._look_seconds = FIRST_LOOK_SECONDS
        self._look_at = self._alarm_at = 0.0
        self._described_bytes = status.needed_bytes
        ranks.describe_weights(status.needed_bytes)

    def activate(self) -> bool:
        """Have all weights there before a schedule, if they can be; it never blocks for room.

        Call it before each schedule while `is_active` is false and there are requests. A wake that
        was begun goes on without them, too: see `rest`.

        Returns:
            Whether a step may run; otherwise the requests wait, and none is scheduled.
        """
        if not self.is_active:
            if (self._status.num_missing_pages or self._stalled_bytes) and not self._wake():
                return False
            self._offer(())
            if self._waking_since_ns:
                self._stop_waking()
            self.is_active = True
            self._has_slept = self._is_stuck = False
            self._end_wish(WeightsWish.WAKE)
        return True

    def activate_now(self) -> None:
        """Have all weights there, and wait for it: for calls that are no requests.

        Raises:
            NoRoomError: If neighbours do not give enough.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.activate():
            if self._ranks.is_over(deadline):
                shortage = self._ranks.explain_shortage()
                if not self._port.is_busy():
                    self._stop_waking()
                    self._offer_resident()
                raise NoRoomError(
                    f"kvcached: there is no room for the weights of this engine: {shortage}; it "
                    "stays asleep, and wakes when others need less"
                )
        self._finish_arriving()

    def rest(self) -> float | None:
        """Nothing runs: offer what is there, go on with a wake, or sleep if it is time to.

        Only what host memory has is offered, and only by an engine that can be woken to give it.

        Returns:
            In how many seconds to call it again, or None if nothing is to be done by itself.
        """
        self._stalled_bytes = 0
        is_waking = self._waking_since_ns > 0 and self._wish is not WeightsWish.SLEEP
        if (is_waking or self._wish is WeightsWish.WAKE) and not self.activate():
            return REFUSAL_SECONDS
        self._finish_arriving()
        if self.is_active and not self._begin_to_offer():
            return self._look_seconds if self._port.can_be_woken else None
        if self._wish is WeightsWish.SLEEP:
            self._empty()
        elif self._sleep_after is not None and not self._has_slept:
            left_seconds = self._idle_since + self._sleep_after - self._ranks.clock()
            if left_seconds > 0:
                return left_seconds
            self._empty()
        return None

    @property
    def can_give(self) -> bool:
        """Whether some may be given: what was offered, unless a request has come since."""
        return bool(self._offered) and (self._waking_since_ns > 0 or not self._port.is_busy())

    def give(self, num_bytes: int) -> int:
        """Give about so many bytes of each rank's weights, in whole pages, the last ones first.

        Returns:
            How many it was; 0 if none may be given.
        """
        status = self._status
        if num_bytes <= 0 or not self.can_give:
            return 0
        num_pages = min(-(-num_bytes // status.page_bytes), status.num_resident_pages)
        self._hold(status.num_resident_pages - num_pages)
        self._offer_resident()
        num_given = status.num_resident_pages - self._status.num_resident_pages
        return num_given * status.page_bytes

    def sleep(self) -> None:
        """Give all weights, whoever wants them, while no step runs. They stay if nowhere copied."""
        self._look_at = 0.0
        if not self._is_copied():
            logger.warning(
                "kvcached: the weights stay, %s a rank: host memory does not have them all",
                format_bytes(self._status.num_resident_pages * self._status.page_bytes),
            )
            return
        self._stop_waking()
        self.is_active = False
        self._has_slept = True
        self._hold(0)
        self._offer_resident()
        self._end_wish(WeightsWish.SLEEP)

    def note_refused(self, num_bytes: int) -> None:
        """Note, after a schedule, that requests found no memory, and whether something is live.

        If that goes on, it waits for weights and KV cache together, as one that wakes: those that
        come before it may have its weights, and it has the room to itself when its turn comes.

        Args:
            num_bytes: What each rank's KV cache lacks; 0 where something is live, and will end.
        """
        self._finish_arriving()
        now = self._ranks.clock()
        if not num_bytes or now > self._refused_at + STALL_SECONDS:
            self._stalled_since = now
        self._refused_at = now
        if now < self._stalled_since + STALL_SECONDS:
            return
        if self._port.can_be_woken and self.is_active and self._is_copied():
            self.is_active = False
            self._stalled_bytes = num_bytes
            self._waking_since_ns = time.monotonic_ns()
            self._ranks.clear_waiting()

    def heed(self, wish: int) -> None:
        """Note what somebody outside wishes, a `WeightsWish`: `rest` fulfils it."""
        self._wish = WeightsWish(wish)
        if self.is_active:
            self._end_wish(WeightsWish.WAKE)

    def _wake(self) -> bool:
        """Have the missing pages if it is this engine's turn; return whether all are there."""
        status = self._status
        if not self._waking_since_ns:
            self._waking_since_ns = time.monotonic_ns()
        stalled_bytes = self._stalled_bytes
        turn = self._ranks.ask_to_wake([one + stalled_bytes for one in status.missing_bytes])
        if turn is not Turn.NOW:
            self._set_alarm()
        if turn is Turn.LATER:
            self._offer_resident()  # who comes first may need what is left of it
            return False
        self._offer(())
        if turn is not Turn.NOW:
            return False
        return not status.num_missing_pages or self._bring()

    def _set_alarm(self) -> None:
        now = time.monotonic()
        if now >= self._alarm_at:
            self._alarm_at = now + ALARM_AGAIN_SECONDS
            self._ranks.set_alarm(ALARM_SECONDS)

    def _bring(self) -> bool:
        """Have the missing pages now that there is room; return whether all are there."""
        started_ns = time.monotonic_ns()
        self._hold(self._status.num_pages)
        if self._status.num_missing_pages:
            return False
        self._is_arriving = self._do_layers_wait
        now_ns = time.monotonic_ns()
        self._ranks.woke(now_ns - self._waking_since_ns, now_ns - started_ns)
        return True

    def _finish_arriving(self) -> None:
        """Have all weights come, also those that wait for a step which comes near them."""
        if self._is_arriving:
            self._is_arriving = False
            self._port.finish_weights()

    def _stop_waking(self) -> None:
        self._stalled_bytes = self._waking_since_ns = 0
        self._ranks.stop_waking()

    def _begin_to_offer(self) -> bool:
        if not self._port.can_be_woken or not self._is_copied():
            return False
        self.is_active = False
        self._idle_since = self._ranks.clock()
        self._offer_resident()
        return True

    def _is_copied(self) -> bool:
        """Return whether host memory has all weights, as far as it was looked at lately."""
        now = self._ranks.clock()
        if not self._status.is_copied and now >= self._look_at:
            self._status = self._merge(self._port.weight_status())
            self._look_seconds = min(2 * self._look_seconds, LAST_LOOK_SECONDS)
            self._look_at = now + self._look_seconds
        return self._status.is_copied

    def _hold(self, num_pages: int) -> None:
        """Have exactly so many pages there, or as many as there can be."""
        self._status = self._merge(self._port.hold_weights(self._status.num_pages - num_pages))
        self._is_stuck |= self._status.num_resident_pages > num_pages

    def _merge(self, status: WeightStatus | None) -> WeightStatus:
        found = self._ranks.merge(status) or self._status
        if found.needed_bytes != self._described_bytes:  # what goes with them has grown, or shrunk
            self._described_bytes = found.needed_bytes
            self._ranks.describe_weights(found.needed_bytes)
        return found

    def _offer_resident(self) -> None:
        status = self._status
        may_go = status.is_copied and not self._is_stuck
        self._offer(status.resident_bytes if may_go else ())

    def _offer(self, rank_bytes: Sequence[int]) -> None:
        """Let others ask for so much of each rank's weights, or for none."""
        offered = rank_bytes if any(rank_bytes) else ()
        # Who has to wait has nothing of what it keeps for itself.
        is_kept = bool(offered) and not self._waking_since_ns
        if (offered, is_kept) != (self._offered, self._is_kept):
            self._offered, self._is_kept = offered, is_kept
            self._ranks.offer_weights(offered or 0, is_kept=is_kept)

    def _end_wish(self, wish: WeightsWish) -> None:
        if self._wish is wish:
            self._wish = WeightsWish.NONE
            self._ranks.end_wish(wish)
