"""What KV connectors tell one profile's pages from another's by; test_transfers.py has those that move pages."""

import contextlib
import inspect
import resource
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnectorMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, UniformTypeKVCacheSpecs

from tests.helpers.nixl_workers import spec_of
from vllm_kvtuner.compat import connectors
from vllm_kvtuner.pages.layout import PrecisionPair


def test_connectors_keep_profiles_apart(monkeypatch):
    """What an offloading connector files pages under."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1 import example_connector, offloading_connector
    from vllm.v1.kv_offload.config import OffloadingModelConfig

    @dataclass(frozen=True)
    class Built:
        model: OffloadingModelConfig

    built = Built(OffloadingModelConfig("model", "kvtuner"))
    monkeypatch.setattr(offloading_connector, "build_offloading_config", lambda config, caches: built)
    # Without the seam that other tests of this process may have installed.
    original = inspect.unwrap(KVConnectorFactory.get_connector_class)
    monkeypatch.setattr(KVConnectorFactory, "get_connector_class", original)
    connectors.tell_connectors_of_the_profile()
    asked = SimpleNamespace(kv_connector="OffloadingConnector", kv_connector_module_path=None)
    for _ in range(2):  # as the scheduler does, and the worker
        KVConnectorFactory.get_connector_class(asked)

    def config(dtype, digest):
        cache = SimpleNamespace(cache_dtype=dtype)
        return SimpleNamespace(cache_config=cache, additional_config={"kvtuner_digest": digest})

    def offloaded(*which):
        return offloading_connector.build_offloading_config(config(*which), None).model

    def named(name, *which):
        """What a connector of this name, which files by the model's name and in a folder, files pages under."""

        class Connector:
            def __init__(self, vllm_config, role, kv_cache_config=None):
                self._storage_path, self.model = "pages", vllm_config.model_config.model
                self._kv_cache_config = SimpleNamespace(kv_cache_groups=[])

            def _found_match_for_prompt(self):
                """Of the example's."""

            save_kv_layer = _found_match_for_prompt

        Connector.__name__, Connector.__module__ = name, example_connector.__name__
        given = config(*which)
        given.model_config = SimpleNamespace(model="model")
        made = connectors._of_profile(Connector)(given, "role")
        assert given.model_config.model == "model" and isinstance(made, Connector)
        return made.model, made._storage_path

    assert named("ExampleConnector", "kvtuner", "a") == ("model", "pages/a")
    assert named("ExampleConnector", "auto", "a") == ("model", "pages")
    assert named("LMCacheMPConnector", "kvtuner", "a") == ("model-kvtuner-a", "pages")
    assert named("LMCacheMPConnector", "auto", "a") == ("model", "pages")
    assert named("NixlConnector", "kvtuner", "a") == ("model", "pages")

    assert offloaded("auto", "a") is built.model
    assert offloaded("kvtuner", "a") == OffloadingModelConfig("model", "kvtuner-a")


def example_of_profile(folder):
    """vLLM's, of two layers with pages of unlike pairs, as an engine with our cache makes it."""
    from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector

    specs = {f"layer.{bits}": spec_of(PrecisionPair(bits, bits), 2) for bits in (8, 2)}
    group = KVCacheGroupSpec(list(specs), UniformTypeKVCacheSpecs(32, specs))
    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="kvtuner", block_size=32),
        additional_config={"kvtuner_digest": "d"},
        kv_transfer_config=SimpleNamespace(get_from_extra_config=lambda *_: str(folder)),
    )
    cache = KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=[group])
    made = connectors._of_profile(ExampleConnector)(config, KVConnectorRole.WORKER, cache)
    caches = {
        name: torch.randint(256, (4, 2, 32, spec.page_size_bytes // 64), dtype=torch.uint8)
        for name, spec in specs.items()
    }
    return made, caches


def store(connector, caches, prompt):
    """Of one step."""
    metadata = ExampleConnectorMetadata()
    metadata.add_request(prompt, [3, 1], 32, True, [])
    connector.bind_connector_metadata(metadata)
    for name, cache in caches.items():
        connector.save_kv_layer(name, cache, None)


@contextlib.contextmanager
def files_of_at_most(size):
    """A full disk, as far as a process sees it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


PROMPT = list(range(50))


@pytest.mark.parametrize("layer", [0, 1])
def test_examples_files_that_are_cut_short_are_no_hit(layer, tmp_path):
    """They end the engine if they are read; the prompt is computed and stored again."""
    connector, caches = example_of_profile(tmp_path)
    assert not connector._found_match_for_prompt(PROMPT, [])
    store(connector, caches, PROMPT)
    assert connector._found_match_for_prompt(PROMPT, [])
    file = sorted(tmp_path.rglob("*.safetensors"))[layer]
    whole = file.read_bytes()
    for kept in (len(whole) - 1, 100, 7, 0):
        file.write_bytes(whole[:kept])
        assert not connector._found_match_for_prompt(PROMPT, [])
    file.unlink()
    assert not connector._found_match_for_prompt(PROMPT, [])
    store(connector, caches, PROMPT)
    assert connector._found_match_for_prompt(PROMPT, [])
    assert file.read_bytes() == whole


def test_the_example_goes_on_with_a_full_disk(tmp_path, caplog):
    """A limit on the size of files stands for it, which the smaller layer's keeps."""
    connector, caches = example_of_profile(tmp_path)
    with files_of_at_most(4096), caplog.at_level("WARNING", logger="vllm.kvtuner"):
        store(connector, caches, PROMPT)
    assert "layer.8 is not stored for later prompts" in caplog.text and "layer.2" not in caplog.text
    assert not connector._found_match_for_prompt(PROMPT, [])


def test_offloaded_files_are_whole_or_none(tmp_path):
    """What docs/operate/tiers.md relies on in vLLM: nothing of a full disk stays, and a file cut short is removed."""
    from vllm.v1.kv_offload.tiering.fs.io import batch_load_block, batch_store_block

    size, paths = 8192, [str(tmp_path / "a" / name) for name in ("1.bin", "2.bin")]
    (tmp_path / "a").mkdir()
    blocks = memoryview(bytearray(range(256)) * (2 * size // 256))
    with files_of_at_most(4096), pytest.raises(OSError, match=r"\[Errno"):
        batch_store_block(paths, blocks, [0, size], size, False)
    assert not list(tmp_path.rglob("*.*"))
    batch_store_block(paths, blocks, [0, size], size, False)
    (tmp_path / "a" / "2.bin").write_bytes(bytes(blocks[:4096]))
    with pytest.raises(OSError, match=r"\[Errno") as error:
        batch_load_block(paths, memoryview(bytearray(2 * size)), [0, size], size, False)
    assert error.value.num_succeeded == 1
    assert [file.name for file in tmp_path.rglob("*.*")] == ["1.bin"]
