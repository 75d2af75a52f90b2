"""Tiny models and prompts of the engine tests."""

import random

import pytest

from tests.helpers.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "gemma3", "gemma3")


@pytest.fixture(scope="session")
def gpt_oss(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "gpt_oss", "gpt_oss", num_heads=8)


@pytest.fixture(scope="session")
def granite_swa(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "granite_swa", "granite_swa")


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")


@pytest.fixture(scope="session")
def prompts():
    """Prompts shorter than a block, longer than two, and of lengths between."""
    numbers = random.Random(0)
    return [[numbers.randrange(10, 250) for _ in range(length)] for length in (1, 5, 127, 128, 129, 300)]


@pytest.fixture(scope="module")
def in_process():
    """Engines live in the tests' own process. FlashInfer's sampler would be compiled by nvcc, which may be missing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
        yield
