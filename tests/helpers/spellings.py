"""Which words an engine's parser takes for which of its options, and whether the gateway knows."""

import json
import subprocess

from kvcached_gateway.settings.owned import OWNED_ARGS, why_owned

# Prints each word of a command line that a parser reads as one of its options, by the option's
# names: every option in full, and every beginning of it that the parser takes for it.
SPELLINGS = """
import json
found = {}
for action in parser._actions:
    for option in action.option_strings:
        for length in range(2, len(option) + 1):
            word = option[:length]
            try:
                (match,) = [parser._option_string_actions[word]] if (
                    word in parser._option_string_actions
                ) else [one[0] for one in parser._get_option_tuples(word)]
            except ValueError:
                continue
            found[word] = match.option_strings
print("\\n" + json.dumps(found))
"""


def spellings(done: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    """Return what such a process found: the names of an option, by word."""
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_spellings(engine: str, found: dict[str, list[str]]) -> None:
    """Fail unless just those words are refused that mean what the gateway owns."""
    owned = OWNED_ARGS[engine]
    assert len(found) > 1000
    missed = [
        word
        for word, options in found.items()
        if set(options) & set(owned) and why_owned(engine, word) is None
    ]
    assert missed == []
    too_much = [
        word
        for word, options in found.items()
        if word in options and not set(options) & set(owned) and why_owned(engine, word)
    ]
    assert too_much == []
