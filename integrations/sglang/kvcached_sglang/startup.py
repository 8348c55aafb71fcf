"""How SGLang starts: our flags, and ranks of which the first one speaks for all.

What is the same for every engine is the core's.
"""

from typing import Any

from kvcached_core.engine.start import Startup
from kvcached_patches import ENGINES, Patcher
from kvcached_patches.sglang import FLAG_HOOKS
from kvcached_sglang.obstacles import argument_obstacles
from kvcached_sglang.parallel import speaks_for_instance

_flags = Patcher(FLAG_HOOKS)

startup = Startup(ENGINES["sglang"], speaks_for_instance)


def add_flags() -> None:
    """Add `--enable-kvcached` and its companions to SGLang's arguments."""
    if not _flags.applied:
        _flags.apply()


def check_arguments(arguments: Any) -> None:
    """Refuse what the arguments alone can tell, before anything of the engine is made.

    Args:
        arguments: What was parsed, or a `ServerArgs`.

    Raises:
        SystemExit: With every reason and the setting to change; under `auto` it only warns.
    """
    if startup.is_on:
        startup.serves(argument_obstacles(arguments))
