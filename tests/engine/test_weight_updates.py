"""When what follows the weights is made anew, and when that is refused."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from vllm import distributed

from vllm_kvtuner.engine import weight_updates
from vllm_kvtuner.engine.key_bias import rest_of_bias
from vllm_kvtuner.pages.feedback import RoundFeedback, triangular_factors

LAYERS = 3
DIAGONALS = {"before": (4.0, 1.0), "after": (1.0, 9.0)}
ADAPTING = SimpleNamespace(adapts=True)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(distributed, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(distributed, "tensor_model_parallel_all_reduce", lambda energy: energy)


def layer_of(index, offset):
    transforms = SimpleNamespace(key_offset="from_weights", key_round_feedback=False)
    settings = SimpleNamespace(precision=SimpleNamespace(index=index, transforms=transforms))
    impl = SimpleNamespace(settings=settings, num_kv_heads=2, head_size=8, dtype=torch.float32, configured=0)
    impl.transforms = SimpleNamespace(key_offset=offset)

    def configure(settings):
        impl.configured += 1

    impl.configure = configure
    return SimpleNamespace(impl=impl)


def worker_with(monkeypatch, biases, full_graphs=False, connector=None):
    """Of layers whose offsets are all 1, once weights of these biases were loaded; notes who is bound."""
    layers = {str(index): layer_of(index, torch.ones(2, 8)) for index in range(LAYERS)} | {"other": SimpleNamespace()}
    mode = SimpleNamespace(has_full_cudagraphs=lambda: full_graphs)
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers, cudagraph_mode=mode),
        kv_transfer_config=connector,
    )
    found = iter(biases)
    monkeypatch.setattr(weight_updates, "key_bias", lambda *_: next(found))
    bound = []
    monkeypatch.setattr(weight_updates, "bind_statics", bound.append)
    worker = SimpleNamespace(vllm_config=config, get_model=torch.nn.Module)
    return worker, [layer.impl for layer in list(layers.values())[:LAYERS]], bound


def biases(*values):
    return [None if value is None else torch.full((2, 8), value) for value in values]


@pytest.mark.parametrize("full_graphs", [False, True])
def test_offsets_that_leave_little_are_kept(monkeypatch, full_graphs):
    """They are exact for the pages that were stored with them; a layer without biases has none."""
    worker, impls, bound = worker_with(monkeypatch, biases(1.4, 0.6, None), full_graphs)
    assert not weight_updates.renew_transforms(worker)
    assert not bound and not any(impl.configured for impl in impls)


@pytest.mark.parametrize("moved", [1.6, float("nan")])
def test_those_that_leave_much_are_made_anew(monkeypatch, moved):
    worker, impls, bound = worker_with(monkeypatch, biases(1.0, moved, 1.0))
    assert weight_updates.renew_transforms(worker)
    assert [impl.configured for impl in impls] == [0, 1, 0]
    assert bound == [worker]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"full_graphs": True}, "full CUDA graphs hold them; start the engine with weights of such biases"),
        ({"connector": object()}, "a KV connector may bring pages back that were stored with them"),
    ],
)
def test_what_keeps_them_is_said(monkeypatch, options, why):
    worker, impls, bound = worker_with(monkeypatch, biases(1.0, 3.0, 3.0), **options)
    with pytest.raises(ValueError, match=f"^key_offset from_weights of layers 1-2 must change .*but {why}"):
        weight_updates.renew_transforms(worker)
    assert not bound and not any(impl.configured for impl in impls)


def test_the_rest_is_over_all_ranks(monkeypatch):
    bias, offset = torch.full((2, 8), 2.0), torch.full((2, 8), 1.0)
    assert rest_of_bias(bias, offset) == 1.0
    assert rest_of_bias(bias, None) == 2.0
    monkeypatch.setattr(distributed, "get_tensor_model_parallel_world_size", lambda: 4)
    monkeypatch.setattr(distributed, "tensor_model_parallel_all_reduce", lambda energy: energy + 3 * 2 * 9.0)
    assert rest_of_bias(bias, offset) == pytest.approx(((1 + 3 * 9) / 4) ** 0.5)


@dataclass(frozen=True)
class Transforms:
    key_feedback: RoundFeedback | None
    key_offset: None = None
    key_equalization: None = None


@pytest.mark.parametrize("full_graphs", [False, True])
def test_round_feedback_follows_weights(monkeypatch, full_graphs):
    """In the tensors that full CUDA graphs know; where there are none, kernels hear of it. Layers without stay so."""
    factors = {name: triangular_factors(torch.diag(torch.tensor(each))[None]) for name, each in DIAGONALS.items()}
    before, after = (RoundFeedback(each, {4: (1.0,)}) for each in (factors["before"].clone(), factors["after"]))
    with torch.inference_mode():  # as in a step
        read = before.factors, before.columns, before.weights
    worker, impls, bound = worker_with(monkeypatch, biases(1.0, 1.0, 1.0), full_graphs)
    for impl, known in zip(impls, (before, None, before), strict=True):
        impl.transforms = Transforms(known)
        impl.bind_statics = lambda transforms, impl=impl: setattr(impl, "transforms", transforms)
    for impl in impls[:2]:
        impl.settings.precision.transforms.key_round_feedback = "from_weights"
    monkeypatch.setattr(weight_updates, "_rests", lambda worker: [])
    monkeypatch.setattr(weight_updates, "heads_of_layer", lambda layer: slice(0, 1))
    monkeypatch.setattr(weight_updates, "resolved_profile", lambda config: SimpleNamespace(profile=ADAPTING))
    monkeypatch.setattr(weight_updates.Feedbacks, "of", lambda *_: after)
    assert not weight_updates.renew_transforms(worker)
    assert not bound and impls[1].transforms.key_feedback is None
    if full_graphs:
        assert impls[0].transforms.key_feedback is before
        for mine, others in zip(read, (after.factors, after.columns, after.weights), strict=True):
            assert torch.equal(mine, others)
    else:
        assert impls[0].transforms.key_feedback is after
        assert impls[2].transforms.key_feedback is before and torch.equal(before.factors, factors["before"])
