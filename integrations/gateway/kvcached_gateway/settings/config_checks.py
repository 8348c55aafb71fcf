"""What the parts of the file of models say about each other."""

from collections.abc import Iterable, Mapping, Sequence

from kvcached_core.config import read_config
from kvcached_core.errors import ConfigError
from kvcached_gateway.settings.config import HOST, ModelSettings, Settings
from kvcached_gateway.settings.mistakes import Mistake, Path, nearest
from kvcached_gateway.settings.owned import why_owned, why_owned_variable

MAX_PORT = 65535
# What models have that no engine of ours serves; every other key is about such an engine.
OF_ALL_KINDS = frozenset(
    {"aliases", "class_name", "max_wait_seconds", "max_queue", "max_concurrent"}
)
OF_REMOTE = OF_ALL_KINDS | {"url", "key_env", "kind", "loading"}
OF_ADAPTER = OF_ALL_KINDS | {"adapter_of", "path"}
NOT_OF_ENGINES = frozenset({"url", "key_env", "adapter_of", "path"})
FIELD_KEYS = {field: key for key, field in ModelSettings.keys().items()}


def fields_of_kind(written: Iterable[str]) -> frozenset[str]:
    """Return the fields that a model may have, from the keys that are written of it."""
    keys = set(written)
    if "url" in keys:
        return OF_REMOTE
    if "adapter_of" in keys:
        return OF_ADAPTER
    return frozenset(FIELD_KEYS) - NOT_OF_ENGINES


def check(settings: Settings, environ: Mapping[str, str]) -> None:
    """Refuse settings whose parts do not fit together.

    Args:
        settings: What was read; each value is allowed by itself.
        environ: The gateway's own variables, which its engines have, too.

    Raises:
        Mistake: The first one.
        ConfigError: If one of the variables would end every engine.
    """
    read_config(environ)
    _check_listen(settings)
    _check_devices(("devices",), settings.devices)
    for name, environment in settings.environments.items():
        here: Path = ("environments", name)
        _check_args((*here, "args"), environment.engine, environment.args)
        for variable in environment.env:
            reason = why_owned_variable(variable)
            if reason is not None:
                raise Mistake((*here, "env", variable), f"cannot be set: {reason}; remove it")
        try:
            read_config(environment.env)
        except ConfigError as error:
            raise Mistake((*here, "env"), f"is refused by every engine: {error}") from None
    for model in settings.models.values():
        _check_kind(model, settings, environ)
        _check_class(model, settings)
    _check_names(settings)


def _check_listen(settings: Settings) -> None:
    if settings.port > MAX_PORT:
        raise Mistake(("listen",), f"the largest port is {MAX_PORT}", settings.listen)
    if not settings.is_loopback and settings.keys_file is None:
        raise Mistake(
            ("listen",),
            "others can reach it, so it needs `keys_file`; without one use 127.0.0.1",
            settings.listen,
        )


def _check_kind(model: ModelSettings, settings: Settings, environ: Mapping[str, str]) -> None:
    here: Path = ("models", model.id)
    allowed = fields_of_kind(model.model_fields_set)
    for field in sorted(model.model_fields_set - allowed - model.GIVEN):
        kind = "one that `url` serves" if model.is_remote else "an adapter"
        if not model.is_remote and not model.is_adapter:
            kind = "a model that is neither an adapter nor served by `url`"
        raise Mistake((*here, FIELD_KEYS[field]), f"is no setting of {kind}; remove it")
    if model.is_remote:
        if model.key_env is not None and model.key_env not in environ:
            raise Mistake((*here, "key_env"), "no such variable is set", model.key_env)
    elif model.is_adapter:
        _check_adapter(here, model, settings)
    else:
        _check_engine(here, model, settings)


def _check_adapter(here: Path, model: ModelSettings, settings: Settings) -> None:
    base = settings.models.get(model.adapter_of or "")
    if base is None or base.is_remote or base.is_adapter:
        others = [other.id for other in _engines(settings)]
        raise Mistake(
            (*here, "adapter_of"),
            f"it has to name a model with an engine; {nearest(model.adapter_of or '', others)}",
            model.adapter_of,
        )
    if model.path is None:
        raise Mistake((*here, "path"), "is missing: the adapter's folder, or name on the hub")


def _check_engine(here: Path, model: ModelSettings, settings: Settings) -> None:
    if model.model is None:
        raise Mistake(here, "needs `model`, or `url` or `adapter_of` in its place")
    if model.environment is None:
        known = nearest("", settings.environments)
        raise Mistake(here, f"needs `environment`, one of `environments`: {known}")
    environment = settings.environments.get(model.environment)
    if environment is None:
        near = nearest(model.environment, settings.environments)
        text = f"it has to be one of `environments`; {near}"
        raise Mistake((*here, "environment"), text, model.environment)
    for key in ("model", "revision"):
        if str(getattr(model, key) or "").startswith("-"):
            raise Mistake((*here, key), "it must not begin with '-'", getattr(model, key))
    _check_args((*here, "args"), environment.engine, model.args)
    _check_kv(here, model)
    _check_model_devices(here, model, settings)
    _check_nodes((*here, "nodes"), model)
    others = {other.id for other in _engines(settings)} - {model.id}
    for place, other in enumerate(model.warm_with):
        if other not in others:
            text = f"it has to name another model with an engine; {nearest(other, sorted(others))}"
            raise Mistake((*here, "warm_with", place), text, other)


def _check_class(model: ModelSettings, settings: Settings) -> None:
    name = model.class_name
    if name is not None and name not in settings.classes:
        text = f"it has to be one of `classes`; {nearest(name, settings.classes)}"
        raise Mistake(("models", model.id, "class"), text, name)


def _check_args(here: Path, engine: str, args: tuple[str, ...]) -> None:
    for place, argument in enumerate(args):
        owned = why_owned(engine, argument)
        if owned is not None:
            text = f"it sets {owned[0]}, and {owned[1]}; remove it"
            raise Mistake((*here, place), text, argument)


def _check_kv(here: Path, model: ModelSettings) -> None:
    floor, limit = model.kv.floor, model.kv.limit
    if isinstance(floor, int) and isinstance(limit, int) and floor > limit:
        raise Mistake((*here, "kv", "floor"), f"it is above `limit`, {limit} bytes", floor)


def _check_model_devices(here: Path, model: ModelSettings, settings: Settings) -> None:
    here = (*here, "devices")
    known = settings.devices
    if known == (HOST,) and model.tensor_parallel > 1:
        text = "engines on the host have one device; use 1"
        raise Mistake((*here[:-1], "tensor_parallel"), text, model.tensor_parallel)
    if model.devices is None:
        if known != "all" and len(known) < model.tensor_parallel:
            text = f"`devices` names {len(known)} of them; use at most that"
            raise Mistake((*here[:-1], "tensor_parallel"), text, model.tensor_parallel)
        return
    _check_devices(here, model.devices)
    if len(model.devices) < model.tensor_parallel:
        text = f"it has to name at least as many as `tensor_parallel`, {model.tensor_parallel}"
        raise Mistake(here, text, list(model.devices))
    for place, device in enumerate(model.devices):
        if known != "all" and device not in known:
            text = f"it has to be one of the gateway's `devices`; {nearest(device, known)}"
            raise Mistake((*here, place), text, device)


def _check_nodes(here: Path, model: ModelSettings) -> None:
    if "nodes" in model.model_fields_set and not model.nodes:
        raise Mistake(here, "is empty; name a label, or leave it out for any node")
    _check_once(here, model.nodes)


def _check_devices(here: Path, devices: str | tuple[str, ...]) -> None:
    if devices == "all":
        return
    if not devices:
        raise Mistake(here, "is empty; name a device, or leave it out")
    _check_once(here, devices)
    if HOST in devices and len(devices) > 1:
        raise Mistake(here, f"{HOST!r} stands alone, without GPUs", list(devices))


def _check_once(here: Path, names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        if name in names[:place]:
            raise Mistake((*here, place), "it is there twice", name)


def _check_names(settings: Settings) -> None:
    owners = {model_id: model_id for model_id in settings.models}
    for model in settings.models.values():
        for place, alias in enumerate(model.aliases):
            if alias in owners:
                text = f"it is a name of {owners[alias]!r} already"
                raise Mistake(("models", model.id, "aliases", place), text, alias)
            owners[alias] = model.id
    instances: dict[str, str] = {}
    for model in _engines(settings):
        name = model.instance_name
        if name in instances:
            text = f"has the instance name of {instances[name]!r}, {name!r}; rename one of them"
            raise Mistake(("models", model.id), text)
        instances[name] = model.id


def _engines(settings: Settings) -> list[ModelSettings]:
    """Return the models that have engines of ours."""
    return [m for m in settings.models.values() if not m.is_remote and not m.is_adapter]
