"""Which engine symbols we hook, as data, and the one way to check, apply and revert them."""

from kvcached_patches.apply import Patcher
from kvcached_patches.check import check_hooks, choose_targets
from kvcached_patches.hook import Finding, Hook, HookError

__all__ = ["Finding", "Hook", "HookError", "Patcher", "check_hooks", "choose_targets"]
