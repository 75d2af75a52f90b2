"""CalibrationEngine: trials by switching in one process, refusals that leave it working, and its end.

That a switched engine equals a served profile is shown in tests/serving/cpu/test_calibration.py.
"""

import random
from dataclasses import asdict

import pytest

from kvtuner_tools.engines.calibration import CacheRoom, CalibrationEngine, ModelTransforms
from kvtuner_tools.task_accuracy import load_task
from tests.helpers.engine import cpu_only
from tests.helpers.tiny_model import make_tiny_model, make_tokenizer
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile.profile import TransformSettings

pytestmark = pytest.mark.engine

LAYERS = 4
ROTATED = TransformSettings(key_hadamard=True, value_hadamard=True, range_search=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_tiny_model(tmp_path_factory.mktemp("models") / "llama", num_layers=LAYERS))


@pytest.fixture(scope="module")
def windows():
    numbers = random.Random(0)
    return [[numbers.randrange(10, 250) for _ in range(length)] for length in (90, 40)]


def uniform(name: str, **others: str) -> dict[int, PrecisionPair]:
    pairs = dict.fromkeys(range(LAYERS), PrecisionPair.parse(name))
    return pairs | {int(layer[1:]): PrecisionPair.parse(pair) for layer, pair in others.items()}


@cpu_only
def test_trials(model, windows, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # kernels' tests set it for this process
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "task.jsonl"
    path.write_text('{"question": "1+1?", "answer": "Two.\\n#### 2"}\n')
    task = load_task(path, make_tokenizer(), max_tokens=4)

    with CalibrationEngine(
        model, windows, room=CacheRoom([2], kv_memory_bytes=1 << 24), task=task, dtype="float32"
    ) as engine:
        high, low = engine.score(uniform("K8V8", _2="K16V16")), engine.score(uniform("K2V2", _2="K16V16"))
        assert engine.trial_seconds < engine.start_seconds / 4
        assert high.num_tokens == sum(len(window) - 1 for window in windows)
        assert high.kl_mean < low.kl_mean / 100
        assert high.perplexity_reference == low.perplexity_reference

        engine.set_transforms(ModelTransforms(ROTATED))
        rotated = engine.score(uniform("K2V2", _2="K16V16"))
        engine.set_transforms(ModelTransforms(overrides={0: ROTATED}))
        assert len({low.kl_mean, rotated.kl_mean, engine.score(uniform("K2V2", _2="K16V16")).kl_mean}) == 3

        for wrong, message in (
            (uniform("K4V4"), r"layers\.2: must be K16V16 in this engine, but got K4V4"),
            (uniform("K4V4", _1="K16V16", _2="K16V16"), r"layers\.1: must be quantized in this engine"),
            ({0: PrecisionPair(4, 4)}, "layers must give every layer .* a pair, but got none for 1-3"),
        ):
            with pytest.raises(ValueError, match=message):
                engine.score(wrong)
        with pytest.raises(ValueError, match="statics must be given for the transforms of layers"):
            engine.set_transforms(ModelTransforms(TransformSettings(key_offset=True)))

        engine.set_transforms(ModelTransforms())
        assert asdict(engine.score(uniform("K2V2", _2="K16V16"))) == asdict(low)
        assert engine.score_task(uniform("K2V2", _2="K16V16")).num_questions == 1
    assert [item.name for item in tmp_path.iterdir()] == ["task.jsonl"], "the reference's logits are deleted"


def test_layers_that_do_not_exist_are_refused(model, windows):
    with pytest.raises(ValueError, match=r"unquantized_layers must be layers .*, but got \[7\]"):
        CalibrationEngine(model, windows, room=CacheRoom([1, 7]))
