"""Which decode kernel serves a layer."""

import importlib.util
import logging

import pytest
import torch

from tests.helpers.decode_cases import linear_table
from tests.helpers.paged_cache import make_layout, random_transforms, several_positions
from vllm_kvtuner.kernels import choice
from vllm_kvtuner.kernels.cuda.rows import SEVERAL_POSITIONS
from vllm_kvtuner.pages.transforms import LayerTransforms

DEVICE = torch.device("cuda", 0)
SERVED, UNSERVED = make_layout("K4V4", 128), make_layout("K4V2", 96)


@pytest.fixture
def card(monkeypatch):
    """Sets the card that torch reports, and KVTUNER_DECODE_KERNEL."""

    def set_card(capability, asked=None):
        monkeypatch.setattr(torch.version, "cuda", None if capability is None else "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        if asked is None:
            monkeypatch.delenv("KVTUNER_DECODE_KERNEL", raising=False)
        else:
            monkeypatch.setenv("KVTUNER_DECODE_KERNEL", asked)

    choice._no_cuda_kernel.cache_clear()
    choice._log.cache_clear()
    yield set_card
    choice._no_cuda_kernel.cache_clear()
    choice._log.cache_clear()


@pytest.fixture
def without_cuda_core(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name == "cuda.core" else found(name, package)
    )


def choose(layout=SERVED, transforms=None, soft_cap=0.0, failure=None):
    return choice.decode_kernel(layout, transforms or LayerTransforms(), soft_cap, DEVICE, False, lambda: failure)


def not_asked():
    pytest.fail("the card is tested where Triton serves anyway")


@pytest.mark.parametrize(
    ("capability", "kernel"),
    [
        pytest.param((8, 0), "cuda", id="Ampere"),
        pytest.param((8, 9), "cuda", id="Ada"),
        pytest.param((9, 0), "cuda", id="Hopper"),
        pytest.param((7, 5), "triton", id="Turing"),
        pytest.param((10, 0), "cuda", id="Blackwell"),
        pytest.param((12, 0), "cuda", id="GeForce Blackwell"),
        pytest.param(None, "triton", id="no CUDA"),
    ],
)
def test_the_default_follows_the_architecture(card, capability, kernel):
    card(capability)
    assert choose() == kernel


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_a_card_that_fails_its_self_test_is_left_to_the_portable_kernels(card, capability):
    card(capability)
    assert choose(failure="K4V4: decode error 1") == "triton"
    assert choice.row_kernels(SERVED, DEVICE, lambda: "K4V4: decode error 1") == "triton"


def test_cuda_asked_for_on_a_card_that_fails_is_an_error(card):
    card((9, 0), "cuda")
    with pytest.raises(ValueError, match=r"failed their self-test on this card \(NVRTCError: no\); leave it unset or"):
        choose(failure="NVRTCError: no")


@pytest.mark.parametrize(
    ("capability", "asked", "layout"),
    [((9, 0), "triton", SERVED), ((7, 5), None, SERVED), (None, None, SERVED), ((9, 0), None, UNSERVED)],
    ids=["asked for", "old card", "no CUDA", "layer"],
)
def test_only_a_card_that_would_serve_by_cuda_is_tested(card, capability, asked, layout):
    card(capability, asked)
    transforms = LayerTransforms()
    assert choice.decode_kernel(layout, transforms, 0.0, DEVICE, False, not_asked) == "triton"
    served_rows = layout is UNSERVED  # its store and gather are CUDA's
    assert choice.may_take_cuda(layout, capability) == served_rows
    if not served_rows:
        assert choice.row_kernels(layout, DEVICE, not_asked) == "triton"


def test_the_default_leaves_layers_to_the_portable_kernel_that_cuda_does_not_serve(card):
    card((9, 0))
    assert choose(UNSERVED) == "triton"


def test_the_default_without_cuda_core(card, without_cuda_core):
    card((9, 0))
    assert choose() == "triton"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_what_is_asked_for_is_taken(card, capability):
    card(capability, "cuda")
    assert choose() == "cuda"
    card(capability, "triton")
    assert choose() == "triton"


@pytest.mark.parametrize(
    ("capability", "layout", "reason"),
    [
        pytest.param((7, 5), SERVED, r"compute capability \(7, 5\) is below \(8, 0\)", id="old card"),
        pytest.param(None, SERVED, "torch is built without CUDA", id="no CUDA"),
        pytest.param((9, 0), UNSERVED, "head_size 96 with 2-bit values", id="layer"),
    ],
)
def test_cuda_asked_for_where_it_cannot_run_is_an_error(card, capability, layout, reason):
    card(capability, "cuda")
    with pytest.raises(ValueError, match=rf"^KVTUNER_DECODE_KERNEL is 'cuda', but {reason}.*; leave it unset"):
        choose(layout)


def test_cuda_asked_for_without_cuda_core_is_an_error(card, without_cuda_core):
    card((9, 0), "cuda")
    with pytest.raises(ValueError, match="the package cuda-core is not installed"):
        choose()


@pytest.mark.parametrize(
    ("capability", "asked", "layout", "kernel"),
    [
        pytest.param((9, 0), None, UNSERVED, "cuda", id="a layer whose decode is the portable kernel's"),
        pytest.param((9, 0), "triton", SERVED, "triton", id="asked for the portable ones"),
        pytest.param((10, 0), None, SERVED, "cuda", id="a newer card"),
        pytest.param((9, 0), "cuda", make_layout("K4V4", 80), "triton", id="rows that CUDA does not serve"),
    ],
)
def test_store_and_gather_follow_the_same_variable(card, capability, asked, layout, kernel):
    card(capability, asked)
    assert choice.row_kernels(layout, DEVICE, lambda: None) == kernel


def log_of(caplog, monkeypatch):
    """Gives what has been logged, in order."""
    logger = logging.getLogger("vllm.vllm_kvtuner.kernels.choice")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])  # vLLM's loggers do not propagate
    monkeypatch.setattr(logger, "propagate", False)
    caplog.set_level(logging.INFO, logger=logger.name)
    return lambda: [record.getMessage() for record in caplog.records]


def test_an_offset_of_several_positions_is_the_portable_kernels(card, caplog, monkeypatch):
    """CUDA's turn from token to token by one position; nobody asks them, and the log says so."""
    card((9, 0))
    heard, cpu = log_of(caplog, monkeypatch), torch.device("cpu")
    offset = random_transforms(2, 64, cpu, several_positions(linear_table(64, True, 64, cpu), 1), offset=1.0)
    layout = make_layout("K4V4", 64)
    assert choice.decode_kernel(layout, offset, 0.0, DEVICE, False, not_asked) == "triton"
    assert choice.row_kernels(layout, DEVICE, not_asked, offset) == "triton"
    assert heard() == [
        f"{kernel}: triton, since {SEVERAL_POSITIONS}" for kernel in ("decode kernel", "store and gather kernels")
    ]


def test_the_choice_and_its_reason_are_logged_once(card, caplog, monkeypatch):
    card((9, 0))
    heard = log_of(caplog, monkeypatch)
    for layout in (SERVED, UNSERVED, SERVED, UNSERVED):
        choose(layout)
    first, second = heard()
    assert first == "decode kernel: cuda"
    assert second.startswith("decode kernel: triton, since head_size 96 with 2-bit values")
