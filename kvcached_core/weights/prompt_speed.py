"""How fast an engine computes prompts, at best."""

# Steps with fewer tokens are mostly answers, and shorter times say little.
MIN_PROMPT_TOKENS, MIN_PROMPT_SECONDS = 512, 0.05


class PromptSpeed:
    """The fastest run of steps that are full of tokens.

    A step that answers only, or that comes after a pause, takes longer for a token.

    Attributes:
        tokens_per_second: The most tokens in a second so far; 0 before there was such a run.
    """

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self._since, self._num_tokens = 0.0, 0

    def computed(self, num_tokens: int, now: float) -> None:
        """Note that a step has ended.

        Args:
            num_tokens: The tokens that it computed.
            now: The time, in seconds.
        """
        if num_tokens < MIN_PROMPT_TOKENS:
            self._since, self._num_tokens = now, 0
            return
        self._num_tokens += num_tokens
        if (seconds := now - self._since) >= MIN_PROMPT_SECONDS:
            self.tokens_per_second = max(self.tokens_per_second, self._num_tokens / seconds)
            self._since, self._num_tokens = now, 0
