"""Lets SGLang's processes copy on a CPU, as a plugin that they find beside ours.

Nothing of SGLang is imported here.
"""


def register() -> None:
    """Have the copies of this process made so; SGLang calls it in each of its own."""
    from helpers.hicache_copier import install

    install()
