"""The identity of a model's weights."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from vllm_kvtuner.profile.model_files import ModelFiles
from vllm_kvtuner.profile.weights import DIGEST, PIECE_BYTES, weights_bytes, weights_digest

NUMBERS = {f"layers.{index}.k_proj": np.random.default_rng(index).random((64, 64)) for index in range(3)}


def test_every_tensor_counts(tmp_path):
    save_file(NUMBERS, tmp_path / "model.safetensors")
    digest = weights_digest(tmp_path)
    assert DIGEST.fullmatch(digest)
    for name, tensor in NUMBERS.items():
        save_file({**NUMBERS, name: tensor + 1e-9}, tmp_path / "model.safetensors")
        assert weights_digest(tmp_path) != digest
    for changed in ({**NUMBERS, "more": np.zeros(1)}, {name.upper(): each for name, each in NUMBERS.items()}):
        save_file(changed, tmp_path / "model.safetensors")
        assert weights_digest(tmp_path) != digest
    save_file({name: each.reshape(128, 32) for name, each in NUMBERS.items()}, tmp_path / "model.safetensors")
    assert weights_digest(tmp_path) != digest
    save_file(NUMBERS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert weights_digest(tmp_path) == digest


def test_the_middle_of_a_tensor_is_read(tmp_path):
    tensor = np.zeros(PIECE_BYTES, dtype=np.float32)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    digest = weights_digest(tmp_path)
    for place, same in ((0, True), (len(tensor) // 2, False)):
        changed = tensor.copy()
        changed[place] = 1
        save_file({"a": changed}, tmp_path / "model.safetensors")
        assert (weights_digest(tmp_path) == digest) == same


def test_how_tensors_are_spread_over_files_does_not_matter(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    save_file(NUMBERS, tmp_path / "one" / "model.safetensors")
    names = sorted(NUMBERS)
    places = {name: f"model-0000{min(index, 1)}.safetensors" for index, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: NUMBERS[name] for name in names if places[name] == file}, tmp_path / "two" / file)
    # A second copy in another naming, which a loader does not take, and statics of a profile.
    save_file(NUMBERS, tmp_path / "two" / "consolidated.safetensors")
    assert weights_digest(tmp_path / "two") == weights_digest(tmp_path / "one")
    save_file({"other": np.zeros(1)}, tmp_path / "two" / "training.safetensors")
    assert weights_digest(tmp_path / "two") != weights_digest(tmp_path / "one")
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert weights_digest(tmp_path / "two") == weights_digest(tmp_path / "one")
    assert weights_bytes(tmp_path / "two") == sum(
        (tmp_path / "two" / name).stat().st_size for name in set(places.values())
    )


@pytest.mark.parametrize("damage", ["cut", "no header", "long header", "missing file", "bad index", "none"])
def test_incomplete_weights_have_no_digest(damage, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(NUMBERS, path)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif damage == "no header":
        path.write_bytes(content[:8] + b"x" * 100)
    elif damage == "long header":
        path.write_bytes(b"\xff" * 8 + content)
    elif damage == "missing file":
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    elif damage == "bad index":
        (tmp_path / "model.safetensors.index.json").write_text("[]")
    else:
        path.unlink()
    assert weights_digest(tmp_path) is None
    assert ModelFiles(str(tmp_path)).weights is None


def test_other_formats(tmp_path):
    numbers = np.random.default_rng(0).bytes(1 << 20)
    (tmp_path / "pytorch_model.bin").write_bytes(numbers)
    digest = weights_digest(tmp_path)
    assert DIGEST.fullmatch(digest)
    (tmp_path / "pytorch_model.bin").write_bytes(numbers + b"x")
    assert weights_digest(tmp_path) != digest
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" + numbers[1:])
    assert weights_digest(tmp_path) != digest
