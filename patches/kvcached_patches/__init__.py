"""Which engine symbols we hook, as data, and the one way to check, apply and revert them."""

from kvcached_patches.apply import Patcher
from kvcached_patches.engines import ENGINES, Engine
from kvcached_patches.hook import Finding, Hook, HookError
from kvcached_patches.policy import Installed

__all__ = ["ENGINES", "Engine", "Finding", "Hook", "HookError", "Installed", "Patcher"]
