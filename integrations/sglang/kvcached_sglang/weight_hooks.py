"""Hooks around what reads or writes weights beside a batch: they are all there first."""

from typing import Any

from kvcached_core.errors import NoRoomError
from kvcached_patches.around import around
from kvcached_sglang.engine import engine
from kvcached_sglang.requests import is_updating

# What SGLang answers to each of these, by its name; what has no answer may raise.
ANSWERS = {
    "begin_weight_update": "BeginWeightUpdateReqOutput",
    "check_weights": "CheckWeightsReqOutput",
    "end_weight_update": "EndWeightUpdateReqOutput",
    "get_weights_by_name": "GetWeightsByNameReqOutput",
    "load_lora_adapter": "LoRAUpdateOutput",
    "load_lora_adapter_from_tensors": "LoRAUpdateOutput",
    "send_weights_to_remote_instance": "SendWeightsToRemoteInstanceReqOutput",
    "update_weights_from_disk": "UpdateWeightFromDiskReqOutput",
    "update_weights_from_distributed": "UpdateWeightsFromDistributedReqOutput",
    "update_weights_from_ipc": "UpdateWeightsFromIPCReqOutput",
    "update_weights_from_tensor": "UpdateWeightsFromTensorReqOutput",
}
# Those that write all weights; what others write is seen before weights are given.
UPDATES = frozenset(name for name in ANSWERS if name.startswith(("update_", "end_")))


@around
def use_weights(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap a method that reads or writes weights; without room for them it refuses.

    The scheduler's thread waits for neighbours here, for seconds at most. Every rank comes here,
    and all of them do the same.
    """
    ours, method = engine(), original.__name__
    if ours is None or not ours.yields_weights:
        return original(self, *args, **kwargs)
    try:
        ours.activation.activate_now()
    except NoRoomError as error:
        if method not in ANSWERS:
            raise
        return _refused(method, str(error))
    with ours.awake():
        try:
            return original(self, *args, **kwargs)
        finally:
            weights = ours.own_weights
            # Between the first and the last part of an update a model is not as it runs.
            if weights is not None and not is_updating(ours.port.scheduler):
                weights.follow(is_update=method in UPDATES, is_captured=_recaptures(*args))


def _recaptures(request: Any = None, *_: Any) -> bool:
    return bool(getattr(request, "recapture_cuda_graph", False))


def _refused(method: str, reason: str) -> Any:
    from sglang.srt.managers import io_struct

    answer = getattr(io_struct, ANSWERS[method])
    if method == "get_weights_by_name":
        return answer(parameter=None)
    if method.startswith("load_lora"):
        return answer(success=False, error_message=reason)
    return answer(success=False, message=reason)
