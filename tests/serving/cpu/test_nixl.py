"""Prefill and decode apart: two engines, NIXL between them, and what a client sees when one is gone; float32.

Where NIXL is not installed, a stand-in reads the other process's memory (tests/helpers/nixl_stand_in).
"""

import importlib.util
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.engine import cpu_only
from tests.helpers.transfer_end import TransferEnd

pytestmark = cpu_only

PROFILE = """\
version: 1
layers: {0: K8V8, 1: K4V2, 2: K8V4, 3: K2V2}
transforms: {key_hadamard: true, value_hadamard: true}
"""
WINDOW = PROFILE + "recent_window: 64\n"
OTHER = PROFILE.replace("K8V4", "K4V8")
"""Pages of the same size."""


def prompt_of(length):
    numbers = random.Random(length)
    return [numbers.randrange(10, 250) for _ in range(length)]


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    paths = {}
    for name, text in (("plain", PROFILE), ("window", WINDOW), ("other", OTHER)):
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


@pytest.mark.parametrize(("architecture", "profile"), [("llama", "window"), ("gemma3", "plain")])
def test_the_decoding_engine_goes_on_as_one_engine_alone(architecture, profile, profiles, start, request):
    """Pages, of layers that share blocks too, and recent windows."""
    model = request.getfixturevalue(architecture)
    both = options(profiles[profile])
    prefill, decode = start(model, ("kv_producer", both), ("kv_consumer", both))
    prompts = [prompt_of(length) for length in (5, 128, 300, 517)]
    for prompt in prompts:
        alone = prefill.decode(prompt, None)
        assert decode.decode(prompt, prefill.prefill(prompt).params).token_ids == alone.token_ids
    assert decode.prompt_tokens_moved() == sum(map(len, prompts))


def test_either_end_may_go(llama, profiles, start):
    """The request that was under way is computed again, fails, or is forgotten; all others are answered as ever."""
    plain = options(profiles["plain"])
    recompute = {**plain, "transfer": {"kv_load_failure_policy": "recompute"}}
    prefill, decode, patient = start(llama, ("kv_producer", plain), ("kv_consumer", plain), ("kv_consumer", recompute))
    prompt, other = prompt_of(300), prompt_of(301)
    expected = [decode.decode(each, None).token_ids for each in (prompt, other)]

    # The pages' owner is gone before they were read.
    kept = [prefill.prefill(prompt_of(length)) for length in (300, 301)]
    prefill.kill()
    (again,) = start(llama, ("kv_producer", plain))
    lost = decode.decode([*prompt_of(300), 7], {**kept[0].params})
    assert (lost.finish_reason, lost.token_ids) == ("error", ())
    assert patient.decode(other, kept[1].params).token_ids == expected[1]

    # Its successor serves the engines that knew it.
    said = patient.decode(prompt, again.prefill(prompt).params)
    assert (said.token_ids, said.finish_reason) == (expected[0], "length")

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
