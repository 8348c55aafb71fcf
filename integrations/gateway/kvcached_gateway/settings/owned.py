"""What the gateway itself tells an engine, so that nobody else may: arguments and variables.

Arguments are known in every spelling that the engines' parsers take: `--port=1`, `--po 1`,
`--served_model_name`, `-tp2`.
"""

from collections.abc import Mapping

_DECIDES = "the gateway decides it"
_DEVICES = "the gateway chooses devices; `tensor_parallel` and `devices` say how many and which"
_ADDRESS = "the gateway decides where its engines listen"
_KEYS = "the gateway gives its engines keys of their own"
_NAMES = "a model's name and its `aliases` are what it serves"
_SLEEP = "`when_idle` says what a model does without requests"
_MODEL = "`model` says it"
_REVISION = "`revision` says it"
_FILE = "write its arguments into `args`"
_COUNTERS = "the gateway reads its engines' counters"

_OF_BOTH = {
    "--host": _ADDRESS,
    "--port": _ADDRESS,
    "--grpc-port": _ADDRESS,
    "--ssl-keyfile": _ADDRESS,
    "--ssl-certfile": _ADDRESS,
    "--ssl-ca-certs": _ADDRESS,
    "--enable-ssl-refresh": _ADDRESS,
    "--api-key": _KEYS,
    "--served-model-name": _NAMES,
    "--model": _MODEL,
    "--revision": _REVISION,
    "--config": _FILE,
    "--tensor-parallel-size": _DEVICES,
    "--pipeline-parallel-size": _DEVICES,
    "--data-parallel-size": _DEVICES,
    "--device": _DEVICES,
    "--nnodes": _DEVICES,
    "--node-rank": _DEVICES,
}
OWNED_ARGS: dict[str, dict[str, str]] = {
    "vllm": {
        **_OF_BOTH,
        "--uds": _ADDRESS,
        "--grpc": _ADDRESS,
        "--headless": _ADDRESS,
        "--root-path": _ADDRESS,
        "--ssl-cert-reqs": _ADDRESS,
        "--ssl-ciphers": _ADDRESS,
        "--no-enable-ssl-refresh": _ADDRESS,
        "--api-server-count": _ADDRESS,
        "-asc": _ADDRESS,
        "-tp": _DEVICES,
        "-pp": _DEVICES,
        "-n": _DEVICES,
        "-r": _DEVICES,
        "--master-addr": _DEVICES,
        "--master-port": _DEVICES,
        "--device-ids": _DEVICES,
        "--distributed-executor-backend": _DEVICES,
        "--data-parallel-rank": _DEVICES,
        "--data-parallel-start-rank": _DEVICES,
        "--data-parallel-size-local": _DEVICES,
        "--data-parallel-address": _DEVICES,
        "--data-parallel-rpc-port": _DEVICES,
        "--data-parallel-backend": _DEVICES,
        "--data-parallel-hybrid-lb": _DEVICES,
        "--data-parallel-external-lb": _DEVICES,
        "--data-parallel-multi-port-external-lb": _DEVICES,
        "--data-parallel-supervisor-port": _DEVICES,
        "--no-data-parallel-hybrid-lb": _DEVICES,
        "--no-data-parallel-external-lb": _DEVICES,
        **dict.fromkeys(
            ("-dp", "-dpn", "-dpr", "-dpl", "-dpa", "-dpp", "-dpb", "-dph", "-dpe", "-dpm"),
            _DEVICES,
        ),
        "--enable-sleep-mode": _SLEEP,
        "--no-enable-sleep-mode": _SLEEP,
        "--disable-log-stats": _COUNTERS,
    },
    "sglang": {
        **_OF_BOTH,
        "--fastapi-root-path": _ADDRESS,
        "--ssl-keyfile-password": _ADDRESS,
        "--grpc-mode": _ADDRESS,
        "--smg-grpc-mode": _ADDRESS,
        "--smg-http-sidecar-port": _ADDRESS,
        "--grpc-http-sidecar-port": _ADDRESS,
        "--sidecar": _ADDRESS,
        "--sidecar-args": _ADDRESS,
        "--enable-http2": _ADDRESS,
        "--gated-launch-port": _ADDRESS,
        "--nccl-port": _ADDRESS,
        "--admin-api-key": _KEYS,
        "--model-path": _MODEL,
        "--tp-size": _DEVICES,
        "--pp-size": _DEVICES,
        "--dp-size": _DEVICES,
        "--dist-init-addr": _DEVICES,
        "--nccl-init-addr": _DEVICES,
        "--base-gpu-id": _DEVICES,
        "--gpu-id-step": _DEVICES,
        "--use-ray": _DEVICES,
        "--enable-memory-saver": _SLEEP,
        "--enable-weights-cpu-backup": _SLEEP,
        "--enable-draft-weights-cpu-backup": _SLEEP,
        "--enable-kvcached": _DECIDES,
        "--kvcached-name": _DECIDES,
        "--kvcached-limit": "`kv` says it",
        "--kvcached-floor": "`kv` says it",
        "--kvcached-priority": "`kv` says it",
    },
}
# Arguments of an engine that are the beginning of one of ours, and mean something else.
_FREE_ARGS: dict[str, frozenset[str]] = {"vllm": frozenset(), "sglang": frozenset()}

OWNED_VARIABLES: Mapping[str, str] = {
    "ENABLE_KVCACHED": _DECIDES,
    "KVCACHED_DIR": "it is the gateway's own",
    "KVCACHED_NAME": _DECIDES,
    "KVCACHED_LIMIT": "`kv` says it",
    "KVCACHED_FLOOR": "`kv` says it",
    "KVCACHED_PRIORITY": "`kv` says it",
    "KVCACHED_WEIGHTS": _SLEEP,
    "CUDA_VISIBLE_DEVICES": _DEVICES,
    "VLLM_API_KEY": _KEYS,
    "VLLM_SERVER_DEV_MODE": "it opens paths that the gateway never asks for",
}
_LONG = "--"


def why_owned(engine: str, argument: str) -> tuple[str, str] | None:
    """Return the argument of the gateway's that an engine would read in a word, and whose it is.

    Args:
        engine: `vllm` or `sglang`.
        argument: One word of a command line.

    Returns:
        The argument's full name and a reason, or None for a word that is free.
    """
    if not argument.startswith("-"):
        return None
    owned = OWNED_ARGS[engine]
    name = argument.partition("=")[0]
    if name.startswith(_LONG):  # vLLM takes `_` for `-`, and `--outer.inner` for a part of JSON
        name = name.partition(".")[0].replace("_", "-")
    if name in owned:
        return name, owned[name]
    if name in _FREE_ARGS[engine]:
        return None
    for full, reason in owned.items():
        is_short = not full.startswith(_LONG)
        if full.startswith(name) or (is_short and name.startswith(full)):
            return full, reason
    return None


def why_owned_variable(name: str) -> str | None:
    """Return why an environment's engines cannot be given this variable, or None if they can."""
    return OWNED_VARIABLES.get(name)
