"""What is asked of each model: rates from counters, and means that forget."""

import math
from dataclasses import dataclass, field

HALF_LIFE_SECONDS = 600.0
WINDOW_SECONDS = 60.0
LEAST_STEP_SECONDS = 0.001  # readings that lie nearer say nothing of a rate
SAMPLE_SHARE = 0.2  # of one more measurement in a mean
DEFAULT_TPOT_SECONDS = 0.1  # the goal of a model without one
# Until an engine has counted the tokens of a few prompts: what English text has for a byte.
FIRST_TOKENS_PER_BYTE = 0.25


@dataclass
class Rate:
    """Events a second, from a counter that grows: a mean over about `window_seconds`.

    Attributes:
        window_seconds: What is older than this counts little.
    """

    window_seconds: float = WINDOW_SECONDS
    _sum: float = 0.0
    _weight: float = 0.0
    _last: tuple[float, float] | None = None

    def counted(self, total: float, now: float) -> None:
        """Take a reading of the counter; one below the last is a counter that began again."""
        last = self._last
        if last is not None and now - last[1] < LEAST_STEP_SECONDS:
            return
        self._last = (total, now)
        if last is None:
            return
        before, then = last
        num_new = total - before if total >= before else total
        keep = math.exp(-(now - then) / self.window_seconds)
        self._sum = self._sum * keep + num_new / (now - then) * (1 - keep)
        self._weight = self._weight * keep + 1 - keep

    @property
    def per_second(self) -> float | None:
        """The mean; None before the second reading."""
        return self._sum / self._weight if self._weight else None


@dataclass
class DecayedCount:
    """How often something happened, of which half is forgotten in `half_life_seconds`.

    Attributes:
        half_life_seconds: How fast it forgets.
    """

    half_life_seconds: float = HALF_LIFE_SECONDS
    _count: float = 0.0
    _at: float = 0.0

    def add(self, now: float, count: float = 1.0) -> None:
        """Let it have happened."""
        self._count = self.at(now) + count
        self._at = max(self._at, now)

    def at(self, now: float) -> float:
        """Return what is left of it."""
        return float(self._count * 2 ** (-max(now - self._at, 0.0) / self.half_life_seconds))


@dataclass
class Mean:
    """A mean of measurements, of which the last ones count most.

    Attributes:
        value: The mean; None before the first one.
    """

    value: float | None = None

    def measured(self, value: float) -> None:
        """Take one more measurement."""
        before = value if self.value is None else self.value
        self.value = before + SAMPLE_SHARE * (value - before)


@dataclass
class Demand:
    """What is asked of one model, and how fast it reads.

    Attributes:
        frequency: Its requests, decayed: what it is worth to keep.
        arrivals: Its requests a second.
        tokens: What it computes a second: prompts without cached prefixes, and answers.
        bytes_per_second: How fast its engine reads prompts, as bytes of their bodies.
    """

    frequency: DecayedCount = field(default_factory=DecayedCount)
    arrivals: Rate = field(default_factory=Rate)
    tokens: Rate = field(default_factory=Rate)
    bytes_per_second: Mean = field(default_factory=Mean)
    _num_arrivals: int = 0
    _num_bytes: int = 0
    _first: tuple[float, int] | None = None
    _tokens_per_byte: float = FIRST_TOKENS_PER_BYTE

    @property
    def num_arrivals(self) -> int:
        """How many requests came."""
        return self._num_arrivals

    def arrived(self, now: float) -> None:
        """Count a request."""
        self.frequency.add(now)
        self._num_arrivals += 1

    def sent(self, body_bytes: int) -> None:
        """Count what goes to the engine."""
        self._num_bytes += body_bytes

    def counted(self, computed_tokens: float, prompt_tokens: float, now: float) -> None:
        """Take a reading of the engine's counters; ones that began again are a new engine's.

        Args:
            computed_tokens: What it computed so far, in and out, without cached prefixes.
            prompt_tokens: All tokens of prompts so far, with those of cached prefixes.
            now: When they were read.
        """
        self.tokens.counted(computed_tokens, now)
        self.arrivals.counted(self._num_arrivals, now)
        if self._first is None or prompt_tokens < self._first[0]:
            self._first = (prompt_tokens, self._num_bytes)
        num_tokens, num_bytes = prompt_tokens - self._first[0], self._num_bytes - self._first[1]
        if num_tokens and num_bytes:
            self._tokens_per_byte = num_tokens / num_bytes

    def read(self, body_bytes: int, seconds: float) -> None:
        """Measure how fast a prompt was read by an engine that read no other one meanwhile."""
        if seconds > 0:
            self.bytes_per_second.measured(body_bytes / seconds)

    @property
    def reading_speed(self) -> float:
        """How many bytes of prompts it reads a second; infinite where that was never measured."""
        return self.bytes_per_second.value or math.inf

    def reading_seconds(self, body_bytes: int) -> float:
        """Return what reading a prompt takes; 0 where that was never measured."""
        return body_bytes / self.reading_speed

    def prompt_tokens(self, body_bytes: int) -> float:
        """Return about how many tokens a prompt has."""
        return body_bytes * self._tokens_per_byte


def weighted_rate(
    tokens_per_second: float | None, token_bytes: int, tpot_seconds: float | None
) -> float | None:
    """Return how hard a model presses on its device: bytes of KV a second for its goal.

    None where its rate is not known yet.
    """
    if tokens_per_second is None:
        return None
    return tokens_per_second * token_bytes / (tpot_seconds or DEFAULT_TPOT_SECONDS)
