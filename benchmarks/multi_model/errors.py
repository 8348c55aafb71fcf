"""What a run refuses."""


class ModeError(ValueError):
    """A mode or a workload that cannot be run here; the message says why and what can."""
