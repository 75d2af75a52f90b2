"""``kvtuner bench transfer``: the link, what is counted, its comparison and its refusals."""

import argparse
import importlib
import importlib.util

import numpy as np
import pytest

from kvtuner_tools import bench
from kvtuner_tools.bench import transfer
from tests.helpers.engine import cpu_only
from tests.helpers.transfer_end import STAND_IN


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["transfer", "model", *words])


def test_a_link_carries_one_transfer_after_the_other():
    limited_link = importlib.import_module("kvtuner_tools.engines.limited_link")
    now = [10.0]
    link = limited_link.Link(clock=lambda: now[0])
    assert link.send(1000) == 10.0  # no limit
    link.bytes_per_s = 100.0
    assert link.send(50) == pytest.approx(10.5)
    assert link.send(100) == pytest.approx(11.5)
    now[0] = 20.0
    assert link.send(100) == pytest.approx(21.0)
    assert link.moved == 1250


def test_a_transfer_is_done_when_the_link_would_have_brought_it(monkeypatch):
    """And counts the bytes of the descriptors that it names, in the form of either vLLM version."""
    limited_link = importlib.import_module("kvtuner_tools.engines.limited_link")
    monkeypatch.syspath_prepend(str(STAND_IN))
    api = importlib.import_module("nixl._api")
    memory = [np.arange(4096, dtype=np.uint8), np.zeros(4096, dtype=np.uint8)]
    owner, reader = api.nixl_agent("owner"), api.nixl_agent("reader")
    for agent, each in zip((owner, reader), memory, strict=True):
        agent.register_memory(agent.get_reg_descs([(each.ctypes.data, each.nbytes, 0, "")], "DRAM"))
    now = [0.0]
    link = limited_link.Link(clock=lambda: now[0])
    link.bytes_per_s = 100.0
    limited = limited_link.LimitedAgent(reader, link)
    rows = np.array([[memory[1].ctypes.data + 100 * number, 100, 0] for number in range(4)], dtype=np.uint64)
    here = limited.prep_xfer_dlist("NIXL_INIT_AGENT", limited.get_xfer_descs(rows, "DRAM"))
    strided = np.array([[memory[0].ctypes.data, 100, 0, 100, 4]], dtype=np.uint64)
    name = limited.add_remote_agent(owner.get_agent_metadata())
    there = limited.prep_xfer_dlist(name, limited.get_xfer_descs(strided, "DRAM"))
    for local in (here, there):
        assert limited._lengths[local].tolist() == [100] * 4
    handle = limited.make_prepped_xfer("READ", here, np.array([3, 1]), there, np.array([0, 2]), notif_msg=b"done")
    limited.transfer(handle)
    assert link.moved == 200
    now[0] = 1.9
    assert limited.check_xfer_state(handle) == "PROC"
    now[0] = 2.1
    assert limited.check_xfer_state(handle) == "DONE"
    limited.release_xfer_handle(handle)
    assert memory[1][300:400].tolist() == memory[0][:100].tolist()
    assert owner.get_new_notifs() == {"reader": [b"done"]}


def entry(bits, wire, disk, milliseconds):
    seconds = {"median": milliseconds / 1e3, "all": [milliseconds / 1e3]}
    return {
        "stored_bits": bits,
        "wire": {"bytes_per_token": wire},
        "first_token_s": {"1 Gbit/s": seconds},
        "tiers": {"disk": {"bytes_per_token": disk, "hit_s": seconds}},
    }


def test_bytes_are_set_against_the_first_setting_and_against_stored_bits():
    settings = {"auto": entry(16.0, 1000.0, 1010.0, 90.0), "kvtuner:K4V4": entry(4.5, 281.25, 303.0, 30.0)}
    settings["fp8_inc"] = entry(None, 500.0, 505.0, 50.0)
    transfer.compare(settings)
    ratio = settings["kvtuner:K4V4"]["ratio"]
    assert ratio["wire"] == {"bytes": 0.28125, "stored_bits": 0.28125, "off_by": 0.0}
    assert ratio["disk"]["off_by"] == pytest.approx(0.3 / 0.28125 - 1)
    assert settings["fp8_inc"]["ratio"]["wire"] == {"bytes": 0.5, "stored_bits": None, "off_by": None}
    cells = [[cell.strip() for cell in line.split("|")] for line in transfer.table(settings).splitlines()]
    assert cells[0][1:-1] == [
        *("setting", "stored bits", "wire B/token", "x first", "bits x first", "1 Gbit/s, ms", "disk B/token"),
        "disk hit, ms",
    ]
    assert cells[3][1:-1] == ["kvtuner:K4V4", "4.50", "281", "0.281", "0.281", "30.0", "303", "30.0"]
    assert cells[4][5] == "-"


@cpu_only
def test_all_that_cannot_be_measured_is_refused_before_an_engine_starts(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    args = parse("--setting=auto", "--setting=auto", "--gbit=1,fast", "--tiers=both", "--prompt=0", "--devices=0")
    with pytest.raises(ValueError, match="NIXL") as refusal:
        transfer._check(args)
    assert [line.partition(" must ")[0] for line in str(refusal.value).splitlines()] == [
        "bench transfer needs NIXL, which is not installed: pip install nixl",
        *("--prompt", "--setting", "--gbit", "--tiers", "--devices"),
    ]
