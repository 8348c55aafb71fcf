"""Which devices a program uses: as it is told, or as its environment says."""

from collections.abc import Mapping, Sequence

from kvcached_core.config import HOST, Config
from kvcached_core.errors import BackendError, ConfigError
from kvcached_core.ledger import nvml
from kvcached_core.memory.devices import Device, cuda_device, host_device

VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
BY_PLACE = "PCI_BUS_ID"  # the order in which NVML numbers GPUs
_NONE = {"", "-1", "NoDevFiles"}


def choose_devices(
    named: Sequence[str], environ: Mapping[str, str], config: Config
) -> list[Device]:
    """Return the devices that a program will use.

    Args:
        named: What the user named: numbers as `nvidia-smi` has them, UUIDs or their beginnings,
            `host`; nothing leaves it to the environment.
        environ: The program's environment.
        config: The settings; they say how large the host's pool is.

    Raises:
        ConfigError: If a device is not there, or it is not clear which is meant.
        BackendError: If the driver says nothing of it.
    """
    uuids = _uuids()
    if not named:
        named = [_only(_visible(environ, uuids), uuids)]
    names = dict.fromkeys(_resolve(name, uuids) for name in named)
    return [_device(name, config) for name in names]


def environment(devices: Sequence[Device], named: Sequence[str]) -> dict[str, str]:
    """Return the variables that let a program see the devices that the user named, and no other."""
    if not named:
        return {}
    return {VISIBLE: ",".join(device.name for device in devices if device.kind != HOST)}


def _uuids() -> tuple[str, ...]:
    try:
        return nvml.gpu_uuids()
    except BackendError:
        return ()


def _visible(environ: Mapping[str, str], uuids: Sequence[str]) -> Sequence[str]:
    text = environ.get(VISIBLE)
    if text is None or not uuids:
        return uuids or [HOST]
    found = []
    for word in map(str.strip, text.split(",")):
        if word in _NONE:
            break  # CUDA sees none of those behind it
        if word.isdecimal() and environ.get(ORDER) != BY_PLACE and len(_models()) > 1:
            raise ConfigError(
                f"{VISIBLE}={text!r} counts GPUs by their speed, and this machine has different "
                f"ones; set {ORDER}={BY_PLACE}, or name the device with --device"
            )
        found.append(word)
    return found or [HOST]


def _models() -> set[str]:
    return {model for model, _ in nvml.gpus()}


def _only(names: Sequence[str], uuids: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    known = ", ".join(f"{number} ({uuid})" for number, uuid in enumerate(uuids))
    raise ConfigError(
        f"{len(names)} GPUs are visible; name each that the program will use with --device: {known}"
    )


def _resolve(name: str, uuids: Sequence[str]) -> str:
    if name == HOST:
        return name
    if name.isdecimal() and int(name) < len(uuids):
        return uuids[int(name)]
    found = [uuid for uuid in uuids if uuid.startswith(name)] if name.startswith("GPU-") else []
    if len(found) == 1:
        return found[0]
    if name.startswith("MIG-"):  # no list of ours has parts of GPUs; who opens it sees
        return name
    known = ", ".join([*map(str, range(len(uuids))), *uuids, HOST])
    raise ConfigError(f"--device={name!r} is not there; there are {known}")


def _device(name: str, config: Config) -> Device:
    if name == HOST:
        return host_device(config)
    return cuda_device(name, nvml.total_memory(name))
