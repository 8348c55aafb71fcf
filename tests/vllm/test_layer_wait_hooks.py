"""A step of vLLM's that can wait layer by layer does, and any other waits for all weights."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.platforms
from torch import nn
from vllm import forward_context
from vllm.config.compilation import CompilationMode

from kvcached_core.weights.arriving import Arriving
from kvcached_core.weights.stages import Points
from kvcached_core.weights.walks import Walks
from kvcached_vllm import layer_waits
from kvcached_vllm.layer_waits import walking

pytestmark = pytest.mark.vllm

NAMES = ("layers.0.attention", "layers.2.attention")
CAPTURED_TOKENS = 512


class Copies:
    """Copies that are done when somebody waits; `num_waited` says for how many."""

    def __init__(self) -> None:
        self.num_begun = self.num_waited = 0

    def begin(self, page: int) -> None:
        self.num_begun = page + 1

    def mark_copies(self) -> Any:
        num_begun = self.num_begun

        def join(_stream: int) -> None:
            self.num_waited = num_begun

        return SimpleNamespace(join=join, close=lambda: None, is_done=lambda: False)


class Model(nn.Module):
    """It looks its attentions up as vLLM's operators do, and notes what was there then."""

    def __init__(self, copies: Copies, order: tuple[str, ...] = NAMES) -> None:
        super().__init__()
        self.copies, self.order = copies, order
        self.seen: list[tuple[Any, int]] = []

    def forward(self) -> None:
        for name in self.order:
            for _ in range(2):  # to write to the cache, and to compute
                layers = forward_context.get_forward_context().no_compile_layers
                self.seen.append((layers[name], self.copies.num_waited))


class Worker:
    """One whose model has three layers of two pages, behind one page."""

    def __init__(self) -> None:
        self.copies = Copies()
        self.arriving = Arriving(self.copies, lambda: 0)  # type: ignore[arg-type]
        self.walks = Walks(self.arriving, Points(3, (7, 7)))
        self.model = Model(self.copies)
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)
        self.kvcached_points = {name: point for point, name in enumerate(NAMES)}
        compilation = SimpleNamespace(max_cudagraph_capture_size=CAPTURED_TOKENS)
        self.model_config = SimpleNamespace(is_multimodal_model=False, enable_prompt_embeds=False)
        self.vllm_config = SimpleNamespace(
            compilation_config=compilation, model_config=self.model_config
        )

    def wake(self) -> None:
        self.copies.num_waited = self.copies.num_begun = 0
        for page in range(7):
            self.arriving.expect(page, self.copies.begin)

    def step(self, num_tokens: int = CAPTURED_TOKENS + 1) -> list[tuple[Any, int]]:
        """Run the model; return each layer that it looked up, and the pages there then."""
        self.model.seen.clear()
        context = SimpleNamespace(no_compile_layers={name: name.upper() for name in NAMES})
        output = SimpleNamespace(total_num_scheduled_tokens=num_tokens)
        with (
            walking(self, self.walks, output),
            forward_context.override_forward_context(context),  # type: ignore[arg-type]
        ):
            self.num_waited_before = self.copies.num_waited
            self.model()
        assert not self.model._forward_pre_hooks
        return self.model.seen


FIRST, SECOND = (name.upper() for name in NAMES)


@pytest.fixture
def worker() -> Worker:
    made = Worker()
    made.step()
    assert not made.walks.is_due
    return made


def test_what_lies_between_two_attentions_is_waited_for_at_the_first(worker: Worker) -> None:
    worker.wake()
    assert worker.step() == [(FIRST, 7), (FIRST, 7), (SECOND, 7), (SECOND, 7)]
    worker.walks = Walks(worker.arriving, Points(3, (5, 7)))
    worker.step()
    worker.wake()
    assert worker.step() == [(FIRST, 5), (FIRST, 5), (SECOND, 7), (SECOND, 7)]
    assert not worker.walks.is_due


def test_what_a_step_copies_for_its_forward_does_not_stand_behind_a_wait(worker: Worker) -> None:
    worker.wake()
    worker.step()
    assert worker.num_waited_before == 0


@pytest.mark.parametrize("setting", ["is_multimodal_model", "enable_prompt_embeds"])
def test_embeddings_that_are_looked_up_before_the_forward_are_there(
    worker: Worker, setting: str
) -> None:
    setattr(worker.model_config, setting, True)
    worker.wake()
    worker.step()
    assert worker.num_waited_before == 3


def test_a_step_that_may_be_a_graph_waits_for_all_at_its_beginning(worker: Worker) -> None:
    worker.walks = Walks(worker.arriving, Points(3, (5, 7)))
    worker.step()
    worker.wake()
    assert {number for _, number in worker.step(CAPTURED_TOKENS)} == {7}
    worker.wake()
    assert worker.step()[0] == (FIRST, 5)


@pytest.mark.parametrize("order", [NAMES[::-1], NAMES[:1], ()])
def test_a_model_of_another_order_waits_for_all(order: tuple[str, ...]) -> None:
    worker = Worker()
    worker.model = Model(worker.copies, order)
    worker.step()
    worker.wake()
    assert all(number == 7 for _, number in worker.step())
    assert not worker.walks.is_due


def parallel(*, use_ubatching: bool = False) -> Any:
    return SimpleNamespace(use_ubatching=use_ubatching)


def compiled(
    *, is_cut: bool = True, mode: int = CompilationMode.VLLM_COMPILE, partition: bool = False
) -> Any:
    return SimpleNamespace(
        mode=mode,
        use_inductor_graph_partition=partition,
        splitting_ops_contain_attention=lambda: is_cut,
    )


@pytest.mark.parametrize(
    ("compilation", "is_opaque", "ubatching", "said"),
    [
        (compiled(), True, False, None),
        (compiled(mode=CompilationMode.NONE, is_cut=False), False, False, None),
        (compiled(), False, False, "--enforce-eager"),
        (compiled(is_cut=False), True, False, "--compilation-config"),
        (compiled(partition=True), True, False, "--compilation-config"),
        (compiled(mode=CompilationMode.NONE), True, True, "--ubatch-size"),
    ],
)
def test_what_is_not_cut_at_attentions_is_said_with_what_to_change(
    monkeypatch: pytest.MonkeyPatch,
    compilation: Any,
    is_opaque: bool,  # noqa: FBT001  a parameter of the test
    ubatching: bool,  # noqa: FBT001  as above
    said: str | None,
) -> None:
    platform = SimpleNamespace(opaque_attention_op=lambda: is_opaque)
    monkeypatch.setattr(vllm.platforms, "current_platform", platform)
    config = SimpleNamespace(
        compilation_config=compilation, parallel_config=parallel(use_ubatching=ubatching)
    )
    reason = layer_waits._obstacle(config)
    assert (reason is None) if said is None else (reason is not None and said in reason)


def test_an_attention_is_found_in_its_layer_and_what_is_outside_is_not() -> None:
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    class Attention(nn.Module, AttentionLayerBase):  # type: ignore[misc]
        def get_attn_backend(self) -> Any:
            raise NotImplementedError

        def get_kv_cache_spec(self, vllm_config: Any) -> Any:
            raise NotImplementedError

    layers = [nn.Sequential(nn.Linear(1, 1), Attention()), nn.Linear(1, 1), Attention()]
    named = {
        "a": layers[0][1],  # type: ignore[index]
        "b": layers[2],
        "experts": layers[1],
        "drafter": Attention(),
    }
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=named))
    with torch.inference_mode():
        assert layer_waits._numbers(config, layers) == {"a": 0, "b": 2}
