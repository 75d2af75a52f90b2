"""Every command and the engine refuse and accept the same models, in the same words, before weights load.

Models are configurations alone: none has weights.
"""

import json

import pytest
from vllm.engine.arg_utils import EngineArgs

from kvtuner_tools import doctor
from kvtuner_tools.calibration.option_checks import check_options
from kvtuner_tools.calibration.options import CalibrationOptions
from kvtuner_tools.evaluate import EvaluationRequest, evaluate, request_settings
from kvtuner_tools.profile_commands import resolve
from tests.helpers.engine import cpu_only
from vllm_kvtuner.plugin import register
from vllm_kvtuner.profile.problems import ProfileError

pytestmark = cpu_only

PROFILE = "K8V8"
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 512,
    "max_position_embeddings": 1024, "dtype": "bfloat16",
}  # fmt: skip
SERVED = {
    "plain": {},
    "a value width that is the keys'": {"v_head_dim": 64},
    "no sink tokens": {"param_sink_number": 0},
    "a quantized cache asked for": {
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": [],
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True},
        }
    },
}  # fmt: skip
REFUSED = {
    "sparse blocks": ({"sparse_attention_config": {"use_sparse_attention": True}}, "but got sparse_attention_config="),
    "a visible prompt": ({"rswa_window": 128}, "but got rswa_window=128"),
    "dual chunks": ({"dual_chunk_attention_config": {"chunk_size": 128}}, "but got dual_chunk_attention_config="),
    "sink tokens": ({"param_sink_number": 4}, "must have no learned sink tokens (not served)"),
    "wide values": ({"v_channels": 128, "head_dim": 64}, "one head size, but got v_channels=128"),
    "narrow values": ({"v_head_dim": 32}, "one head size, but got v_head_dim=32"),
    "chunked layers": ({"layer_types": ["chunked_attention"] * 2}, "but got chunked_attention"),
    "shared caches": ({"num_kv_shared_layers": 1}, "but got num_kv_shared_layers=1"),
}
"""Changes of a Llama's configuration, and what is said of them."""


def check(model, folder):
    resolve(PROFILE, model)


def diagnose(model, folder):
    section, _ = doctor._profile(PROFILE, model, None)
    if section.problems:
        raise ProfileError([problem for problem, _ in section.problems])


def calibrate(model, folder):
    check_options(CalibrationOptions(model=model), folder / "out", ())


def measure(model, folder):
    data = folder / "text.txt"
    data.write_text("a cat sat on the mat")
    evaluate(EvaluationRequest(model, request_settings((), (PROFILE,)), data))


def start(model, folder):
    """As far as an engine gets before it loads."""
    register()
    given = {"kv_cache_dtype": "kvtuner", "additional_config": {"kvtuner_profile": PROFILE}}
    EngineArgs(model=model, skip_tokenizer_init=True, **given).create_engine_config()


COMMANDS = {"profile check": check, "doctor": diagnose, "calibrate": calibrate, "evaluate": measure, "engine": start}


def verdicts(folder, changes):
    """What each says of a model: its problems of that, without what it puts before them."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    found = {}
    for name, command in COMMANDS.items():
        try:
            command(str(model), folder)
        except ProfileError as error:
            lines = (problem.removeprefix(f"{PROFILE}: ") for problem in error.problems)
            found[name] = [line for line in lines if line.startswith(f"model {model} ")]
        else:
            found[name] = []
    return found


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(tmp_path, changes, said):
    found = verdicts(tmp_path, changes)
    engine = found["engine"]
    assert len(engine) == 1 and said in engine[0], found
    assert found == dict.fromkeys(COMMANDS, engine)


@pytest.mark.quick(1)
@pytest.mark.parametrize("changes", SERVED.values(), ids=SERVED.keys())
def test_what_is_accepted(tmp_path, changes):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    for command in (check, diagnose, calibrate, start):
        command(str(model), tmp_path)


@pytest.mark.slow
def test_what_vllm_does_not_read_is_refused_in_its_words(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "no_such_model"}))
    with pytest.raises(ProfileError, match=r"model must be one that vLLM reads, but got .*no_such_model"):
        resolve(PROFILE, str(tmp_path))
