"""How attention layers of vLLM's models meet the layers of a profile."""

from types import SimpleNamespace

import pytest

from vllm_kvtuner.engine.layer_names import MetLayer, layer_index, layers_of_rank, problems_of, sliding_layers
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape

SHAPE = LayerShape(2, 64)
LOOPED = {"architectures": ["IQuestLoopCoderForCausalLM"], "num_hidden_layers": 4, "loop_num": 2}


def engine(stages=1, stage=0, **text):
    """An engine's configuration, as far as layers' names depend on it."""
    total = text.get("num_hidden_layers", 4)
    part = total // stages
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(**text),
            get_total_num_hidden_layers=lambda: total,
            get_layers_start_end_indices=lambda _: (stage * part, (stage + 1) * part),
        ),
    )


def resolved(num_layers=4, spec="K8V8:plain"):
    return load_profile(spec).resolve(ModelShape("m", "ToyForCausalLM", (SHAPE,) * num_layers))


def met(index, name=None, shape=SHAPE, **changes):
    layer = MetLayer(name or f"model.layers.{index}.self_attn.attn", index, shape, shape.head_size)
    return MetLayer(**{**vars(layer), **changes})


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.7.self_attn.attn", 7),
        ("transformer.h.0.attn", 0),
        ("3.attn", 3),
        ("model.layers.7.blocks.1.attn", None),
        ("model.shared_attn", None),
    ],
)
def test_the_number_in_a_name(name, index):
    assert layer_index(engine(), name) == index


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("hybrid", [[2, 5], [1, 3, 5, 7, 9], [0, 4, 8, 12, 16, 20]])
def test_zamba2_layers_are_named_by_uses_of_blocks(blocks, hybrid):
    """As vLLM's Zamba2Attention counts them."""
    config = engine(model_type="zamba2", hybrid_layer_ids=hybrid, num_mem_blocks=blocks)
    names = {}
    for block in range(blocks):
        use = block * (len(hybrid) + blocks - 1) // blocks
        for place, layer in enumerate(hybrid):
            if place % blocks == block:
                assert names.setdefault(use, layer) == layer, "vLLM refuses a name that is given twice"
                use += 1
    assert {use: layer_index(config, f"model.attn.{use}") for use in names} == names
    assert layer_index(config, f"model.attn.{max(names) + 1}") is None


def test_each_layer_met_once_is_right():
    assert problems_of(map(met, range(4)), resolved(), 1, range(4)) == ()


def test_a_layer_that_shares_a_cache_is_met_with_its_owner():
    sharing = met(1, "model.layers.9.self_attn.attn", shares=True)
    assert problems_of([*map(met, range(4)), sharing], resolved(), 1, range(4)) == ()


def test_all_problems_are_said_at_once_with_the_names():
    layers = [met(0), met(0, "model.vision.0.attn"), met(7), met(None, "model.attn"), met(1)]
    unknown, unnamed, twice, missing = problems_of(layers, resolved(), 1, range(4))
    rule = "must be one of the model's layers with keys and values (0-3)"
    assert unknown == f"attention layer model.layers.7.self_attn.attn {rule}, but got number 7"
    assert unnamed == f"attention layer model.attn {rule}, but got a name without one number"
    one = "layer 0 must have one attention layer"
    assert twice == f"{one}, but got model.layers.0.self_attn.attn, model.vision.0.attn"
    assert missing.startswith("layers 2-3 must have an attention layer each")


@pytest.mark.parametrize(
    ("changes", "ranks", "problem"),
    [
        ({"shape": LayerShape(4, 64)}, 1, "must have 2 KV heads of 64 on a rank"),
        ({"shape": LayerShape(2, 64)}, 2, "must have 1 KV heads of 64 on a rank"),
        ({"value_size": 32}, 1, "must have values of the keys' head size 64 at K8V8, but got 32"),
        ({"unlike": "a ChunkedLocalAttention"}, 1, "must be causal attention over its own keys and values at K8V8"),
    ],
)
def test_a_layer_that_is_not_what_the_configuration_says(changes, ranks, problem):
    (found,) = problems_of([met(0, **changes)], resolved(1), ranks, [0])
    assert found.startswith(f"model.layers.0.self_attn.attn: {problem}")


def test_layers_in_vllms_own_cache_may_be_of_any_kind():
    layer = met(0, value_size=32, unlike="a ChunkedLocalAttention")
    assert problems_of([layer], resolved(1, "K16V16"), 1, [0]) == ()


def test_a_rank_has_heads_of_which_there_are_fewer_than_ranks():
    assert problems_of([met(0, shape=LayerShape(1, 64))], resolved(1), 4, [0]) == ()


def test_layers_of_a_pipelines_rank():
    profile = resolved()
    assert layers_of_rank(engine(), profile) == [0, 1, 2, 3]
    assert layers_of_rank(engine(2, 1), profile) == [2, 3]


def test_passes_of_a_looped_model_are_layers_of_their_own():
    shape = ModelShape.from_hf_config({**LOOPED, "num_attention_heads": 2, "hidden_size": 128}, "m")
    assert len(shape.layers) == 8
    profile = load_profile("K8V8:plain").resolve(shape)
    assert layers_of_rank(engine(2, 1, **LOOPED), profile) == [2, 3, 6, 7]
    assert sliding_layers(engine(**LOOPED), profile) == {4, 5, 6, 7}, "later passes see a window beside the first's"


def test_sliding_layers_count_where_others_are_beside_them():
    kinds = ["sliding_attention", "full_attention"] * 2
    assert sliding_layers(engine(layer_types=kinds), resolved()) == {0, 2}
    assert sliding_layers(engine(layer_types=["sliding_attention"] * 4), resolved()) == set()
    assert sliding_layers(engine(), resolved()) == set()
