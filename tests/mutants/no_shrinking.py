"""Lets hypothesis try the same examples each time, and stop at the first that fails."""

from hypothesis import Phase, settings

settings.register_profile(
    "mutants", phases=(Phase.explicit, Phase.generate), derandomize=True, database=None
)
settings.load_profile("mutants")
