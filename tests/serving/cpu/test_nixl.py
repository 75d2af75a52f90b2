"""Prefill and decode apart: two engines, NIXL between them, and what a client sees when one is gone.

Where NIXL is not installed, a stand-in reads the other process's memory (tests/helpers/nixl_stand_in).
"""

import importlib.util
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.engine import cpu_only
from tests.helpers.tiny_model import make_tiny_model
from tests.helpers.transfer_end import TransferEnd

pytestmark = cpu_only

PROFILE = """\
version: 1
layers: {0: K8V8, 1: K4V2, 2: K8V4, 3: K2V2}
transforms: {key_hadamard: true, value_hadamard: true}
"""
WINDOW = PROFILE + "recent_window: 64\nsink_tokens: 4\n"
FINE = PROFILE.replace("{0: K8V8, 1: K4V2, 2: K8V4, 3: K2V2}", "K8V8")
"""For ranks, which add their halves in another order: of few bits, a code that moves by one changes the answer."""
OTHER = PROFILE.replace("K8V4", "K4V8")
"""Pages of the same size."""


def prompt_of(length):
    numbers = random.Random(length)
    return [numbers.randrange(10, 250) for _ in range(length)]


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    paths = {}
    for name, text in (("plain", PROFILE), ("window", WINDOW), ("fine", FINE), ("other", OTHER)):
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(text)
    return paths


@pytest.fixture
def start(tmp_path):
    """Starts ends, several at once, and closes what is left of them."""
    ends = []

    def ends_of(model, *roles_and_options):
        with ThreadPoolExecutor() as pool:
            made = list(pool.map(lambda each: TransferEnd(model, tmp_path, each[0], **each[1]), roles_and_options))
        ends.extend(made)
        return made

    yield ends_of
    for end in ends:
        end.close()


def options(profile, **more):
    return {"additional_config": {"kvtuner_profile": str(profile), "kvtuner_attend_cached_prefill": True}, **more}


@pytest.fixture(scope="module")
def qwen3_next(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "qwen3_next", "qwen3_next")


@pytest.mark.parametrize(
    ("architecture", "profile", "dtype"),
    [("llama", "window", "float32"), ("gemma3", "plain", "float32"), ("qwen3_next", "window", "bfloat16")],
)
def test_the_decoding_engine_goes_on_as_one_engine_alone(architecture, profile, dtype, profiles, start, request):
    """Pages, of layers that share blocks too, recent windows with their sink tokens, and states.

    The decoding engine computes a prompt's last token in a step of its own. So does one engine alone if that is what
    it has generated. In bfloat16 another step rounds otherwise, with any cache.
    """
    model = request.getfixturevalue(architecture)
    both = options(profiles[profile], dtype=dtype)
    prefill, decode = start(model, ("kv_producer", both), ("kv_consumer", both))
    moved = 0
    for length in (5, 95, 128, 300, 517):
        prompt = prompt_of(length - 1)
        last, *expected = prefill.decode(prompt, None, tokens=9).token_ids
        prompt.append(last)
        assert decode.decode(prompt, prefill.prefill(prompt).params).token_ids == tuple(expected)
        moved += len(prompt) - 1
    assert decode.prompt_tokens_moved() == moved


def test_either_end_may_go(llama, profiles, start):
    """The request that was under way is computed again, fails, or is forgotten; all others are answered as ever.

    Whatever the number of ranks at either end.
    """
    plain = options(profiles["fine"])
    ranks = {**plain, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    recompute = {**plain, "transfer": {"kv_load_failure_policy": "recompute"}}
    prefill, decode, patient = start(llama, ("kv_producer", plain), ("kv_consumer", plain), ("kv_consumer", recompute))
    prompt, other = prompt_of(300), prompt_of(301)
    expected = [decode.decode(each, None).token_ids for each in (prompt, other)]

    # The pages' owner is gone before they were read.
    kept = [prefill.prefill(prompt_of(length)) for length in (300, 301)]
    prefill.kill()
    (again,) = start(llama, ("kv_producer", ranks))
    lost = decode.decode([*prompt_of(300), 7], {**kept[0].params})
    assert (lost.finish_reason, lost.token_ids) == ("error", ())
    assert patient.decode(other, kept[1].params).token_ids == expected[1]

    # Its successor serves the engines that knew it, and has another number of ranks.
    for reader in (patient, decode):
        said = reader.decode(prompt, again.prefill(prompt).params)
        assert (said.token_ids, said.finish_reason) == (expected[0], "length")
    assert again.decode(other, patient.prefill(other).params).token_ids == expected[1]
    assert again.prompt_tokens_moved() == 301

    # The reader is gone, and so is what it asked for; the pages' owner serves the others.
    again.prefill(other)
    decode.kill()
    assert patient.decode(prompt_of(400), again.prefill(prompt_of(400)).params).finish_reason == "length"
    assert patient.prompt_tokens_moved() >= 300 + 400


def test_another_profile_is_refused_by_name(llama, profiles, start):
    """Its pages would have the same size."""
    prefill, decode = start(
        llama, ("kv_producer", options(profiles["plain"])), ("kv_consumer", options(profiles["other"]))
    )
    prompt = prompt_of(300)
    assert decode.decode(prompt, prefill.prefill(prompt).params).finish_reason == "error"
    assert (
        "the two engines' pages differ: pairs is K8V8: 0; K4V2: 1; K4V8: 2; K2V2: 3 here and" in decode.log.read_text()
    )
    assert decode.decode(prompt, None).finish_reason == "length"


@pytest.mark.skipif(importlib.util.find_spec("nixl") is not None, reason="NIXL itself has no switch for faults")
def test_a_truncated_page_is_no_answer(llama, profiles, start):
    plain = options(profiles["plain"])
    faulty = {**plain, "environment": {"NIXL_STAND_IN_FAULT": "truncated"}}
    prefill, decode = start(llama, ("kv_producer", plain), ("kv_consumer", faulty))
    prompt = prompt_of(300)
    said = decode.decode(prompt, prefill.prefill(prompt).params)
    assert (said.finish_reason, said.token_ids) == ("error", ())
