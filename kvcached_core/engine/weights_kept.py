"""Weights of an engine that gives none."""


class WeightsKept:
    """The weights of an engine that gives none: they are there.

    Attributes:
        is_active: Whether a step may run: all weights are there, and nobody may ask for them. It is
            all that a schedule looks at.
    """

    is_active = True

    @property
    def can_give(self) -> bool:
        """See `Activation.can_give`."""
        return False

    def activate(self) -> bool:
        """See `Activation.activate`."""
        return True

    def activate_now(self) -> None:
        """See `Activation.activate_now`."""

    def rest(self) -> float | None:
        """See `Activation.rest`."""
        return None

    def give(self, num_bytes: int) -> int:  # noqa: ARG002  there is nothing to give
        """See `Activation.give`."""
        return 0

    def sleep(self) -> None:
        """See `Activation.sleep`."""

    def note_refused(self, num_bytes: int) -> None:
        """See `Activation.note_refused`."""

    def heed(self, wish: int) -> None:
        """See `Activation.heed`."""
