"""A replay of requests against the pure parts of admission, in simulated time.

Engines on one device share it evenly while they read prompts, each its own in order; nothing else
is modelled. It shows that the rule does what it is for, and says nothing about real engines.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvcached_gateway.policy.admission import Prompt, Waiting, has_room, order, stalls_at

STEP_SECONDS = 0.01
TOKENS_PER_SECOND = 20_000.0  # unless a test says something else


@dataclass(eq=False)
class Asked:
    """One request of a schedule."""

    arrival: float
    model: str
    tokens: float
    ttft_seconds: float
    answered_at: float | None = None
    left_tokens: float = 0.0
    stalls_at: float = 0.0

    @property
    def is_in_time(self) -> bool:
        return self.answered_at is not None and self.answered_at <= self.arrival + self.ttft_seconds


@dataclass(eq=False, slots=True, kw_only=True)
class Turn(Waiting):
    """One request that waits."""

    asked: Asked


@dataclass
class Device:
    """Engines that share a device, each with the prompts that it has."""

    tokens_per_second: float = TOKENS_PER_SECOND
    engines: dict[str, deque[Asked]] = field(default_factory=dict)

    def send(self, one: Asked, now: float) -> None:
        one.left_tokens = one.tokens
        one.stalls_at = stalls_at(now, one.tokens / self.tokens_per_second)
        self.engines.setdefault(one.model, deque()).append(one)

    def prompts(self) -> list[Prompt]:
        return [
            Prompt(one.model, one.tokens, one.stalls_at)
            for engine in self.engines.values()
            for one in engine
        ]

    def read(self, now: float) -> None:
        """Let every engine that has a prompt read for one step."""
        busy = [engine for engine in self.engines.values() if engine]
        for engine in busy:
            budget = STEP_SECONDS * self.tokens_per_second / len(busy)
            while engine and budget > 0:
                part = min(budget, engine[0].left_tokens)
                engine[0].left_tokens -= part
                budget -= part
                if not engine[0].left_tokens:
                    engine.popleft().answered_at = now + STEP_SECONDS


def replay(
    schedule: Sequence[Asked],
    *,
    has_admission: bool,
    tokens_per_second: float = TOKENS_PER_SECOND,
) -> None:
    """Answer every request of a schedule; with admission, or at once as they come."""
    device = Device(tokens_per_second)
    line: list[Asked] = []
    coming = deque(sorted(schedule, key=lambda one: one.arrival))
    step = 0
    while coming or line or any(device.engines.values()):
        now = step * STEP_SECONDS
        while coming and coming[0].arrival <= now:
            line.append(coming.popleft())
        if has_admission:
            take_turns(line, device, now)
        else:
            while line:
                device.send(line.pop(0), now)
        device.read(now)
        step += 1


def take_turns(line: list[Asked], device: Device, now: float) -> None:
    """Send those whose turn it is while the engines want prompts."""
    prompts = device.prompts()
    if not any(has_room(name, prompts, now) for name in {one.model for one in line}):
        return
    turns = [
        Turn(
            model=one.model,
            arrival=one.arrival,
            deadline=one.arrival + one.ttft_seconds,
            work=one.tokens / device.tokens_per_second,
            overdue_at=one.arrival + 150.0,
            asked=one,
        )
        for one in line
    ]
    found = order(turns, now)
    for one in (turn.asked for turn in (*found.kept, *found.late)):
        if has_room(one.model, device.prompts(), now):
            line.remove(one)
            device.send(one, now)
