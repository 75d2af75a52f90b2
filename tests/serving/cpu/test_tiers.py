"""Pages that vLLM offloads to memory and disk, and what a later engine finds of them; float32.

tests/helpers/cpu_tiers.py copies between pages and memory, which vLLM does on GPUs alone; the rest is vLLM's.
"""

import random

import numpy as np

from tests.helpers.cpu_tiers import offloading
from tests.helpers.engine import FULL_LOGPROBS, Call, cpu_only, run_engine

pytestmark = cpu_only

PROFILE = """\
version: 1
layers: {0: K8V8, 1: K4V2, 2: K4V4, 3: K2V2}
recent_window: 64
sink_tokens: 4
transforms: {key_hadamard: true, value_hadamard: true}
"""


def test_a_later_engine_goes_on_from_disk_as_from_its_own_prefix_cache(llama, tmp_path):
    """With packed pages, the newest tokens of recent windows, and their sink tokens, bit for bit."""
    profile = tmp_path / "profile.yaml"
    profile.write_text(PROFILE)
    numbers = random.Random(1)
    prompt = [numbers.randrange(10, 250) for _ in range(300)]
    call = Call([prompt], {"max_tokens": 8, "logprobs": FULL_LOGPROBS})
    options = {"profile": profile, "block_size": 32, "kv_transfer_config": offloading(tmp_path / "files")}
    own = run_engine(llama, [call] * 2, **options)
    assert list((tmp_path / "files").rglob("*.bin"))
    later = run_engine(llama, [call], **options)
    (first,), (expected,), (got,) = (*own.answers, *later.answers)
    assert (first.cached_tokens, expected.cached_tokens, got.cached_tokens) == (0, 288, 288)
    assert got.token_ids == expected.token_ids
    assert np.array_equal(got.logprobs, expected.logprobs)
