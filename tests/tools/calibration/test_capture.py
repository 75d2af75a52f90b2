"""Capture inside vLLM: against transformers' queries, keys and values, and killed and resumed."""

import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Glm4Config, Glm4ForCausalLM, PhiConfig, PhiForCausalLM

from kvtuner_tools.cache_setting import AUTO
from kvtuner_tools.calibration import capture as capture_module
from kvtuner_tools.calibration.calibration_text import load_text
from kvtuner_tools.calibration.capture import CAPTURE_FOLDER, CaptureRequest, run_capture
from kvtuner_tools.calibration.captured import Capture
from kvtuner_tools.calibration.rotation import undo_rotary
from kvtuner_tools.engines.evaluate import EngineOptions
from kvtuner_tools.engines.generation import GenerationJob, generate
from kvtuner_tools.engines.unquantized import UnquantizedEngine
from tests.helpers.engine import cpu_only, fork_server
from tests.helpers.tiny_model import SLIDING_WINDOW, WEIGHT_STD, make_tiny_model, make_tokenizer
from vllm_kvtuner.profile.problems import ProfileError

pytestmark = [cpu_only, pytest.mark.engine]

TEXT = "".join(f"Line {number} of the text says what line {number * 7 % 100} does not. " for number in range(60))
NUM_TOKENS = 160


@pytest.fixture(autouse=True)
def forked_engines(monkeypatch):
    """Engines in processes that are forked with vLLM imported."""

    def in_own_process(function, argument):
        with ProcessPoolExecutor(max_workers=1, mp_context=fork_server()) as pool:
            return pool.submit(function, argument).result()

    monkeypatch.setattr(capture_module, "in_own_process", in_own_process)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text(TEXT)
    return path


def make_rotary_model(folder, model_class, config_class, **options):
    """A tiny model of a class that rotates a part of each head only."""
    torch.manual_seed(0)
    config = config_class(
        num_hidden_layers=2,
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=4096,
        partial_rotary_factor=0.5,
        initializer_range=WEIGHT_STD,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        **options,
    )
    model_class(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def request(model, data, tokens=2 * NUM_TOKENS, context=NUM_TOKENS, dtype="float32", seed=0):
    text = load_text(data, make_tokenizer(), tokens=tokens, context=context, seed=seed)
    return CaptureRequest(str(model), text, queries=20, seed=seed, dtype=dtype)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "glm4", "gpt_oss"])
def test_it_is_what_the_model_computes(tmp_path, data, kind):
    model = tmp_path / "model"
    if kind == "glm4":
        make_rotary_model(model, Glm4ForCausalLM, Glm4Config, head_dim=64)
    else:
        make_tiny_model(model, kind, num_layers=2, dtype=torch.float32)
    wanted = request(model, data)
    capture = run_capture(wanted, tmp_path)
    assert capture.windows == (NUM_TOKENS, NUM_TOKENS) and capture.dtype == "float32"
    assert capture.data["source"] == str(data) and capture.data["tokens"] == 2 * NUM_TOKENS

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for window, ids in enumerate(wanted.text.windows):
        before, cached = run_reference(reference, ids)
        for layer in capture.layers:
            got, rotary = capture.load_layer(layer)[window], capture.load_rotary(layer)
            (query, key), seen = before[layer.index], cached.layers[layer.index]
            count = seen.keys.shape[2]  # transformers keeps what a sliding-window layer needs only
            close(got.key[-count:], seen.keys[0].transpose(0, 1))
            close(got.value[-count:], seen.values[0].transpose(0, 1))
            positions = torch.arange(NUM_TOKENS)
            close(undo_rotary(got.key, positions, rotary.near), key.view(got.key.shape))
            rows = query.view(NUM_TOKENS, layer.num_heads, layer.head_size)[got.query_position]
            close(undo_rotary(got.query, got.query_position, rotary.near), rows)
            assert got.query_position.shape == (20,) and got.query_position.min() > 0
            assert (got.query_position.diff() > 0).all()
            assert rotary.near.is_neox == (kind != "glm4")
            assert rotary.near.cos_sin.shape == (NUM_TOKENS, layer.head_size // (2 if kind == "glm4" else 1))
            limit = reference.config.max_position_embeddings
            assert rotary.far_position == limit - NUM_TOKENS
    scales = {layer.scale for layer in capture.layers}
    assert scales == {reference.model.layers[0].self_attn.scaling}
    windows = [SLIDING_WINDOW, None] if kind in ("gemma3", "gpt_oss") else [None, None]
    assert [layer.sliding_window for layer in capture.layers] == windows
    for layer, decoder in zip(capture.layers, reference.model.layers, strict=True):
        sinks = getattr(decoder.self_attn, "sinks", None)
        assert layer.sinks == (None if sinks is None else tuple(sinks.tolist()))
    assert [layer.rotary for layer in capture.layers] == ([0, 1] if kind == "gemma3" else [0, 0])


def reference_grams(reference, ids):
    """W_h^T M W_h' of every layer by the formula, from transformers' weights and residual stream: fp64."""
    streams, gain_of_output = {}, {}

    def keep(name):
        def hook(module, arguments):
            streams[name] = arguments[0][0, 4:].double().square().mean(-1).log().mean().exp()

        return hook

    def gain(norm):
        return norm.weight.double() + ("Gemma" in type(norm).__name__)

    decoder, heads = reference.model, reference.config.num_key_value_heads
    for index, layer in enumerate(decoder.layers):
        is_sandwich = hasattr(layer, "pre_feedforward_layernorm")
        mlp_norm = layer.pre_feedforward_layernorm if is_sandwich else layer.post_attention_layernorm
        layer.input_layernorm.register_forward_pre_hook(keep((index, "attention")))
        mlp_norm.register_forward_pre_hook(keep((index, "mlp")))
        gain_of_output[index] = gain(layer.post_attention_layernorm) if is_sandwich else None
    decoder.norm.register_forward_pre_hook(keep("end"))
    with torch.no_grad():
        predicted = reference(torch.tensor([ids])).logits[0, 4:].double().softmax(-1).mean(0)

    def read(weights, norm, square):
        weight = torch.cat([each.weight for each in weights]).double() * gain(norm)
        return weight.mT @ weight / (len(weight) * square)

    table = reference.get_output_embeddings().weight.double() * gain(decoder.norm)
    mean = predicted @ table
    gram = ((table * predicted[:, None]).mT @ table - torch.outer(mean, mean)) / streams["end"]
    grams = {}
    for index, layer in reversed(list(enumerate(decoder.layers))):
        attention, mlp, sandwich = layer.self_attn, layer.mlp, gain_of_output[index] is not None
        mlp_norm = layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm
        gram = gram + read([mlp.gate_proj, mlp.up_proj], mlp_norm, streams[index, "mlp"])
        output = attention.o_proj.weight.double()
        output = output * gain_of_output[index][:, None] if sandwich else output
        parts = output.view(len(output), heads, -1).permute(1, 0, 2)
        grams[index] = parts.mT @ gram @ parts
        inner = [attention.q_proj, attention.k_proj, attention.v_proj]
        gram = gram + read(inner, layer.input_layernorm, streams[index, "attention"])
    return grams


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_grams_are_what_reads_the_attention_outputs(tmp_path, data, kind):
    make_tiny_model(tmp_path / "model", kind, num_layers=2, dtype=torch.float32)
    wanted = request(tmp_path / "model", data, tokens=NUM_TOKENS)
    capture = run_capture(wanted, tmp_path)
    assert capture.gram_unsupported is None
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    grams = reference_grams(reference.requires_grad_(False), wanted.text.windows[0])
    for layer in capture.layers:
        group = layer.num_heads // layer.num_kv_heads
        got = capture.load_output_gram(layer)
        assert got.shape == (layer.num_kv_heads, group, layer.head_size, group, layer.head_size)
        got, expected = got.double().flatten(1, 2).flatten(2), grams[layer.index]
        if kind == "gemma3":  # behind a norm, which divides by a number that is the same for all heads
            got *= expected.norm() / got.norm()
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def test_a_model_whose_attention_outputs_are_gated_says_so(tmp_path, data):
    make_tiny_model(tmp_path / "model", "qwen3_next", num_layers=2)
    capture = run_capture(request(tmp_path / "model", data, tokens=NUM_TOKENS, dtype="bfloat16"), tmp_path)
    assert "must go straight into a projection, but those of layers [1] do not" in capture.gram_unsupported
    assert capture.load_output_gram(capture.layers[0]) is None


def run_reference(model, ids):
    """Queries and keys before RoPE per layer, and transformers' cache of keys after it and values."""
    before = {}
    hooks = []

    def keep(index, place):
        def hook(module, arguments, output):
            rows = output[0]
            if rows.dim() == 3:  # a norm gives heads first
                rows = rows.transpose(0, 1).flatten(1)
            before.setdefault(index, [None, None])[place] = rows

        return hook

    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for place, name in enumerate("qk"):
            source = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")
            hooks.append(source.register_forward_hook(keep(index, place)))
    with torch.no_grad():
        output = model(torch.tensor([ids]), use_cache=True)
    for hook in hooks:
        hook.remove()
    return before, output.past_key_values


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def test_a_model_with_its_rotary_embedding_elsewhere_says_so(tmp_path, data):
    model = make_rotary_model(tmp_path / "model", PhiForCausalLM, PhiConfig)  # runs on Transformers' modelling code
    capture = run_capture(request(model, data, tokens=NUM_TOKENS), tmp_path)
    for layer in capture.layers:
        assert layer.rotary is None and capture.load_rotary(layer) is None
        assert "needs the rotary embedding beside the attention layer" in layer.offset_unsupported
        assert capture.load_layer(layer)[0].key.shape == (NUM_TOKENS, 2, 64)
        (whole,) = capture.load_windows(layer, [0])
        assert whole.query.shape == (NUM_TOKENS, 4, 64) and whole.query_position.tolist() == list(range(NUM_TOKENS))


def test_killed_and_resumed_it_ends_with_the_same_files(tmp_path, data, monkeypatch):
    model = make_tiny_model(tmp_path / "model", num_layers=3)
    wanted = request(model, data, tokens=34 * 64, context=64, dtype="bfloat16")

    def killed(function, job):
        engine = fork_server().Process(target=function, args=(job,))
        engine.start()
        while not (job.folder / "window-0002").exists():
            time.sleep(0.001)
            assert engine.is_alive()
        os.kill(engine.pid, signal.SIGKILL)
        engine.join()

    with monkeypatch.context() as patch:
        patch.setattr(capture_module, "in_own_process", killed)
        with pytest.raises(ProfileError, match=r"must hold all 34 windows; run the capture again .* but got [1-9]"):
            run_capture(wanted, tmp_path / "killed")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("window-0000/*")}
    run_capture(wanted, tmp_path / "killed")
    assert before == {path: path.stat().st_mtime_ns for path in before}, "a complete window is not captured again"

    beside_others(wanted, model, tmp_path / "undisturbed")
    files = contents(tmp_path / "undisturbed")
    assert len(files) == 34 * 3 + 3 + 2
    assert contents(tmp_path / "killed") == files

    with monkeypatch.context() as patch:
        patch.setattr(capture_module, "in_own_process", None)
        assert run_capture(wanted, tmp_path / "killed") == Capture.read(tmp_path / "killed" / CAPTURE_FOLDER)


def beside_others(wanted, model, out):
    """Capture in an engine that writes text first, and records logits afterwards."""
    options = EngineOptions(
        "test", str(model), "bfloat16", AUTO, 256, 64, 1 << 24, max_num_seqs=4, prefix_caching=False
    )
    with ProcessPoolExecutor(max_workers=1, mp_context=fork_server()) as pool:
        process = SimpleNamespace(run=lambda *call: pool.submit(*call).result())
        engine = UnquantizedEngine(options, out.with_suffix(".logits"), process)
        assert not engine.is_running
        answers = engine.run(generate, GenerationJob((wanted.text.windows[0][:20],), 8, 20, 0.7))
        assert answers[0][1].num_tokens <= 8
        run_capture(wanted, out, engine)
        recorded = engine.record(wanted.text.windows[:2])
    assert recorded.logits.rows == sum(len(window) - 1 for window in recorded.windows)
    assert recorded.logits.path.stat().st_size == recorded.logits.num_bytes and recorded.logits.dtype == "float32"


def contents(folder):
    folder = folder / CAPTURE_FOLDER
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_request_replaces_the_capture_and_nothing_else(tmp_path, data):
    model = make_tiny_model(tmp_path / "model", num_layers=1)
    run_capture(request(model, data), tmp_path)
    kept = tmp_path / CAPTURE_FOLDER / "notes.txt"
    kept.write_text("mine")
    capture = run_capture(request(model, data, seed=1, tokens=NUM_TOKENS), tmp_path)
    assert (len(capture.windows), capture.seed) == (1, 1)
    assert sorted(path.name for path in (tmp_path / CAPTURE_FOLDER).iterdir()) == [
        "capture.json",
        "gram-000.safetensors",
        "notes.txt",
        "rotary-0.safetensors",
        "window-0000",
    ]
    assert kept.read_text() == "mine"


def test_folders_without_a_capture(tmp_path):
    with pytest.raises(ProfileError, match=r"capture\.json: the file must be readable"):
        Capture.read(tmp_path)
