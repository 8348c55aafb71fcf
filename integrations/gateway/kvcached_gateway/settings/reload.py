"""What differs between two readings of the file of models, and what each difference takes."""

import hashlib
import json
from dataclasses import dataclass

from kvcached_gateway.settings.config import Environment, ModelSettings, Settings

# What a running gateway cannot change: where it listens, with how many processes, and on what.
FIXED = ("listen", "keys_file", "workers", "devices")
# What an engine is started with beside its environment; the rest of a model acts at once.
_OF_THE_ENGINE = (
    *("environment", "model", "revision", "aliases", "args", "tensor_parallel", "devices"),
    *("url", "key_env", "adapter_of", "path"),
)


@dataclass(frozen=True)
class Difference:
    """What a reload changes; models by their ids, in the new file's order.

    Attributes:
        added: New models.
        removed: Models that are gone; theirs drain, and end.
        changed: Models whose engines are no longer what the file says; they start again when idle.
        adjusted: Models of which only limits, classes, pins and the like differ; they hold at once.
        fixed: Keys that differ and that only a restart of the gateway can change.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    adjusted: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()

    def sentence(self) -> str:
        """Return it for people: `added one; adjusted two, three`."""
        parts = (
            f"{verb} {', '.join(names)}"
            for verb, names in (
                ("added", self.added),
                ("removed", self.removed),
                ("changed", self.changed),
                ("adjusted", self.adjusted),
            )
            if names
        )
        return "; ".join(parts) or "no model differs"


def difference(old: Settings, new: Settings) -> Difference:
    """Return what a reload from `old` to `new` changes."""
    both = [model_id for model_id in new.models if model_id in old.models]
    changed = {model_id for model_id in both if _digest(old, model_id) != _digest(new, model_id)}
    return Difference(
        added=tuple(model_id for model_id in new.models if model_id not in old.models),
        removed=tuple(model_id for model_id in old.models if model_id not in new.models),
        changed=tuple(model_id for model_id in both if model_id in changed),
        adjusted=tuple(
            model_id
            for model_id in both
            if model_id not in changed and old.models[model_id] != new.models[model_id]
        ),
        fixed=tuple(key for key in FIXED if getattr(old, key) != getattr(new, key)),
    )


def engine_digest(model: ModelSettings, environment: Environment | None) -> str:
    """Return a hash of all that a model's engine is started with.

    Engines with different ones are not the same engine, at a reload and at an adoption. Where it
    runs is not in it, nor what may be told to one that runs, such as its limit.

    Args:
        model: The model.
        environment: Where its engine is, or None for one that has none of ours.
    """
    values: dict[str, object] = {key: getattr(model, key) for key in _OF_THE_ENGINE}
    values["does_yield"] = model.when_idle == "yield"
    if environment is not None:
        values["program"] = environment.model_dump(mode="json", exclude={"name"})
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(settings: Settings, model_id: str) -> str:
    model = settings.models[model_id]
    return engine_digest(model, settings.environments.get(model.environment or ""))
