"""Which engine symbols we hook, as data, and the one way to check, apply and revert them."""

from kvcached_patches.apply import Patcher
from kvcached_patches.hook import Finding, Hook, HookError
from kvcached_patches.policy import (
    Installed,
    check_installed,
    doctor_findings,
    find_installed,
    hooks_of,
    report,
)

__all__ = [
    "Finding",
    "Hook",
    "HookError",
    "Installed",
    "Patcher",
    "check_installed",
    "doctor_findings",
    "find_installed",
    "hooks_of",
    "report",
]
