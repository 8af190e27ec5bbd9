"""The table of plans: which entry is found, what is not a valid table, and that a launcher's plan can be replaced."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from memrewrite.kernels import triton_plans
from memrewrite.kernels.triton_plans import PlanError, tuned

PLAN = {"rows": 8, "block": 512, "warps": 2, "registers": 64, "cache": "evict_first"}
ENTRY = {
    "device": "cpu", "date": "2026-01-01", "triton": "3.6.0", "kernel": "forward", "dtype": "bfloat16", "size": [1024],
    "plan": PLAN,
}  # fmt: skip
CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Replace the table by these entries."""

    def write(*entries, text: str | None = None) -> Path:
        file = tmp_path / f"plans{len(list(tmp_path.iterdir()))}.json"
        file.write_text(json.dumps({"plans": entries}) if text is None else text)
        monkeypatch.setattr(triton_plans, "FILE", file)
        triton_plans._found.cache_clear()
        return file

    yield write
    triton_plans._found.cache_clear()


def test_the_table_of_the_package_is_valid():
    triton_plans.table(triton_plans.FILE)


def test_an_entry_is_found_by_kernel_dtype_and_size(write):
    write(ENTRY, {**ENTRY, "size": [2048], "plan": {"rows": 4, "block": 256, "warps": 1}})
    assert tuned("forward", CPU, BF16, 1024) == PLAN
    assert tuned("forward", CPU, BF16, 2048) == {
        "rows": 4, "block": 256, "warps": 1, "registers": None, "cache": "evict_last",
    }  # fmt: skip
    assert tuned("forward", CPU, torch.float16, 1024) is None
    assert tuned("forward", CPU, BF16, 512) is None
    assert tuned("token_dots", CPU, BF16, 1024) is None
    assert tuned("forward", torch.device("meta"), BF16, 1024) is None


def test_the_name_of_a_device_is_preferred_to_its_compute_capability(write, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    device, other = torch.device("cuda", 0), {**PLAN, "rows": 16}
    write({**ENTRY, "device": "sm_90", "plan": other}, {**ENTRY, "device": "NVIDIA H100 80GB HBM3"})
    assert tuned("forward", device, BF16, 1024) == PLAN
    write({**ENTRY, "device": "sm_90", "plan": other}, {**ENTRY, "device": "NVIDIA H200"})
    assert tuned("forward", device, BF16, 1024) == other
    write({**ENTRY, "device": "sm_100"})
    assert tuned("forward", device, BF16, 1024) is None


def test_a_plan_in_use_replaces_the_table(write):
    write(ENTRY)
    plan = {**PLAN, "rows": 2}
    with triton_plans.use("forward", plan), triton_plans.use("token_dots", PLAN):
        assert tuned("forward", CPU, BF16, 3) == plan
        assert tuned("token_dots", CPU, BF16, 3) == PLAN
    assert tuned("forward", CPU, BF16, 1024) == PLAN
    assert tuned("token_dots", CPU, BF16, 3) is None
    with pytest.raises(PlanError, match="power of two"), triton_plans.use("forward", {**PLAN, "rows": 3}):
        pass


@pytest.mark.parametrize(("change", "message"), [
    ({"kernel": "backwards"}, "no kernel 'backwards'"),
    ({"dtype": "bf16"}, "'bf16' is no dtype"),
    ({"size": [1024, 32]}, "has the sizes [width]"),
    ({"size": ["1024"]}, "has the sizes [width]"),
    ({"size": 1024}, "size is 1024"),
    ({"date": 2026}, "date is 2026"),
    ({"speed": 1}, "it has device, date"),
    ({"ms": "fast"}, "ms is 'fast'"),
    ({"plan": {**PLAN, "row": 8}}, "has the fields rows, block, warps, registers, cache, row"),
    ({"plan": {"rows": 8, "block": 512}}, "needs rows, block, warps"),
    ({"plan": {**PLAN, "rows": 6}}, "rows = 6: it must be a power of two"),
    ({"plan": {**PLAN, "rows": True}}, "rows = True"),
    ({"plan": {**PLAN, "block": 8}}, "at least 16"),
    ({"plan": {**PLAN, "warps": 64}}, "at most 32"),
    ({"plan": {**PLAN, "registers": 8}}, "try null, or 16 to 255"),
    ({"plan": {**PLAN, "registers": 255, "warps": 16}}, "do not fit on a multiprocessor"),
    ({"plan": {**PLAN, "rows": 4096}}, "2**20"),
    ({"plan": {**PLAN, "cache": "always"}}, "try one of 'evict_last'"),
    ({"kernel": "topk_half", "size": [9, 2], "plan": {"rows": 1, "chunk": 8, "group": 16, "warps": 1}}, "a group of 16"),
])  # fmt: skip
def test_an_entry_that_no_kernel_can_use_is_an_error(write, change, message):
    file = write(ENTRY, {**ENTRY, **change})
    with pytest.raises(PlanError, match=re.escape(message)) as error:
        tuned("forward", CPU, BF16, 1024)
    assert str(error.value).startswith(f"{file}, entry 1")


def test_two_entries_for_the_same_are_an_error(write):
    write(ENTRY, {**ENTRY, "date": "2026-01-02"})
    with pytest.raises(PlanError, match="earlier entry"):
        tuned("forward", CPU, BF16, 1024)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plans": {}}', '{"plans": [3]}'])
def test_a_file_of_another_form_is_an_error(write, text):
    write(text=text)
    with pytest.raises(PlanError, match="plans"):
        tuned("forward", CPU, BF16, 1024)


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(PlanError, match="no kernel 'lookup'"):
        tuned("lookup", CPU, BF16, 1024)
