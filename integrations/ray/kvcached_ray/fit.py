"""Whether the installed Ray is one that we know: all that we lean on has to be as it was locked."""

from kvcached_core.errors import ConfigError
from kvcached_patches.engines import RAY
from kvcached_patches.locks import locked_releases

__all__ = ["check_ray"]


def check_ray() -> None:
    """Refuse a Ray that has no lock, or differs from it.

    Raises:
        ConfigError: With each difference.
    """
    found = RAY.installed()
    known = ", ".join(locked_releases("ray"))
    if found is None:
        raise ConfigError(
            f"Ray is not installed; pip install 'kvcached-elastic[ray]' brings {known}"
        )
    findings = RAY.findings(found)
    if findings:
        lines = "".join(f"\n  - {finding}" for finding in findings)
        raise ConfigError(f"Ray {found.release} is not served, only {known}: {lines}")
