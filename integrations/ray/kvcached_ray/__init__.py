"""The gateway on many machines, as a Ray Serve application: `serve run kvcached_ray:app`.

On each node a replica is the gateway of that machine, and a door takes requests to the node that
serves them. Members, addresses, restarts and machines that fail are Ray's business.
"""

from typing import Any

__all__ = ["Arguments", "app"]


def __getattr__(name: str) -> Any:
    """Return what the application is made of; to import it imports Ray."""
    if name in __all__:
        from kvcached_ray import application

        return getattr(application, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
