"""What holds for all tests."""

from contextlib import suppress

with suppress(ImportError):  # what runs on a GPU machine does without it
    from hypothesis import settings

    # A time limit for each example says how busy the machine is, and nothing else.
    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")
