"""The Triton top-k in Triton's interpreter: values against the reference, order of ties, NaN, strides; and its backward."""

from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch
from closeness import assert_norm_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memrewrite.kernels import reference, torch_topk

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run with TRITON_INTERPRET=1, as `make test` does"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    from memrewrite.kernels import triton_topk

    return triton_topk


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that the launchers allocate is filled with NaN and the largest keys, not with zeros."""
    empty = torch.empty

    def poison(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(NAN if out.is_floating_point() else torch.iinfo(out.dtype).max)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture(params=["few", "many"])
def few(request, kernels, monkeypatch) -> bool:
    """Both plans (few rows, many rows), for any number of rows."""
    monkeypatch.setattr(kernels, "FEW_ROWS", 10**9 if request.param == "few" else 0)
    return request.param == "few"


def scores_of(rows: int, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(1000 * seed + n)).to(dtype)


def defined(scores1: Tensor, scores2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The order that the kernels guarantee if no sum is rounded: descending, NaN first, smaller slots first in equal sums."""
    sums = (scores1.float().unsqueeze(-1) + scores2.float().unsqueeze(-2)).flatten(-2)
    best, slots = sums.sort(dim=-1, descending=True, stable=True)
    return best[..., :k], slots[..., :k]


def assert_best(scores1: Tensor, scores2: Tensor, got: tuple[Tensor, Tensor], k: int) -> None:
    """The scores are equal bit for bit; indices are distinct, and each gives a sum with its score."""
    scores, indices = got
    want, _ = reference.product_key_topk(scores1.float(), scores2.float(), k)
    assert scores.dtype == torch.float32
    assert indices.dtype == torch.int64
    torch.testing.assert_close(scores, want, rtol=0, atol=0, equal_nan=True)
    n2 = scores2.shape[-1]
    sums = scores1.float().gather(-1, indices // n2) + scores2.float().gather(-1, indices % n2)
    torch.testing.assert_close(scores, sums, rtol=0, atol=0, equal_nan=True)
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n1", "n2", "k"),
    [(1, 1, 1), (40, 60, 1), (60, 60, 7), (63, 200, 33), (2, 128, 2)],
)
def test_the_best_sums(kernels, few, n1, n2, k, dtype):
    scores1, scores2 = scores_of(2, n1, dtype), scores_of(2, n2, dtype, seed=1)
    assert_best(scores1, scores2, kernels.forward(scores1, scores2, k), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_than_a_program_has(kernels, few, dtype):
    rows = 3 if few else 37
    scores1, scores2 = scores_of(rows, 130, dtype), scores_of(rows, 130, dtype, seed=1)
    assert_best(scores1, scores2, kernels.forward(scores1, scores2, 5), 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1024, 32), (520, 64), (260, 200)])
def test_larger(kernels, few, n, k, dtype):
    scores1, scores2 = scores_of(1, n, dtype), scores_of(1, n, dtype, seed=1)
    assert_best(scores1, scores2, kernels.forward(scores1, scores2, k), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k", "high"), [(60, 8, 2), (300, 16, 4), (1024, 4, 3), (200, 5, 1)])
def test_ties_go_to_the_smaller_slot(kernels, few, n, k, high, dtype):
    """Small integers: nearly every sum occurs several times, and none is rounded."""
    g = torch.Generator().manual_seed(n)
    scores1, scores2 = (torch.randint(-1, high, (2, n), generator=g).to(dtype) for _ in range(2))
    want, slots = defined(scores1, scores2, k)
    scores, indices = kernels.forward(scores1, scores2, k)
    assert torch.equal(scores, want)
    assert torch.equal(indices, slots)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_largest_and_zeros_are_one(kernels, few, dtype):
    n = 40 if few else 200
    for special in ((NAN, INF), (-INF,), (0.0, -0.0), (NAN, INF, -0.0)):
        scores1, scores2 = (torch.full((2, n), -1.0, dtype=dtype) for _ in range(2))
        for place, value in enumerate(special):
            scores1[0, 3 + 11 * place :: 17] = value
            scores2[1, n - 2 - place] = value
        scores1[1, 5] = -NAN if NAN in special else 3.0
        scores, indices = got = kernels.forward(scores1, scores2, 8)
        assert_best(scores1, scores2, got, 8)
        assert not scores[scores == 0].signbit().any()
        if special == (0.0, -0.0):
            assert torch.equal(indices, defined(scores1, scores2, 8)[1])


def test_all_scores_are_minus_infinity(kernels, few):
    scores = torch.full((2, 70), -INF, dtype=torch.float16)
    got, indices = kernels.forward(scores, scores, 9)
    assert (got == -INF).all()
    assert indices.tolist() == [list(range(9))] * 2


def test_strided_inputs(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "FEW_ROWS", 2)
    both = scores_of(8 * 3, 24, torch.bfloat16).view(8, 3, 24)  # [2h, T, n]: the halves are every second head
    wide = scores_of(9, 65, torch.bfloat16)
    parts = both.view(2, 2, 2, 3, 24)
    cases = {
        "every second head": (both[::2], both[1::2]),
        "heads last": (both[::2].transpose(0, 1), both[1::2].transpose(0, 1)),
        "expanded": (both[0], both[1, :1].expand(3, 24)),
        "at odd addresses": (wide[:, 1:32], wide[:, 34:65]),
        "at odd addresses, few": (wide[:2, 1:32], wide[5:7, 34:65]),
        "not along the keys": (wide.T[:6], wide.T[30:36]),
        "three leading dims": (parts[:, :, 0], parts[:, :, 1]),
        "too many strides": (parts.permute(3, 1, 2, 0, 4), parts.permute(3, 1, 0, 2, 4)),
        "no leading dims": (wide[0], wide[1]),
        "other strides": (both[::2].transpose(0, 1), both[1::2].transpose(0, 1).contiguous()),
    }
    for name, (scores1, scores2) in cases.items():
        got = kernels.forward(scores1, scores2, 6)
        assert got[0].shape == (*scores1.shape[:-1], 6), name
        assert_best(scores1, scores2, got, 6)


def test_no_rows(kernels):
    scores, indices = kernels.forward(torch.zeros(0, 3, 20), torch.zeros(0, 3, 30), 4)
    assert scores.shape == indices.shape == (0, 3, 4)
    grad1, grad2 = kernels.backward(scores, indices, 20, 30)
    assert grad1.shape == (0, 3, 20)
    assert grad2.shape == (0, 3, 30)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter's numpy
@pytest.mark.parametrize("k", [1, 6, 32])
def test_softmax(kernels, few, k):
    scores1, scores2 = (scores_of(2, 40, torch.bfloat16, seed) for seed in range(2))
    plain, indices = kernels.forward(scores1, scores2, k)
    weights, again = kernels.forward(scores1, scores2, k, softmax=True)
    assert torch.equal(indices, again)
    torch.testing.assert_close(weights, plain.softmax(-1), rtol=1e-6, atol=1e-7)
    scores1[0, 7] = NAN
    assert kernels.forward(scores1, scores2, k, softmax=True)[0][0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softmax", [False, True])
def test_a_batch_may_be_split(kernels, monkeypatch, dtype, softmax):
    """The same bits in two runs, for a part of the rows, and with both plans."""
    scores1, scores2 = ((3 * scores_of(3, 150, dtype, seed)).round() for seed in range(2))
    whole = kernels.forward(scores1, scores2, 8, softmax)
    assert all(map(torch.equal, whole, kernels.forward(scores1, scores2, 8, softmax)))
    monkeypatch.setattr(kernels, "FEW_ROWS", 0)
    many = kernels.forward(scores1[1:3], scores2[1:3], 8, softmax)
    assert all(torch.equal(one[1:3], other) for one, other in zip(whole, many, strict=True))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_input(kernels, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    n1, n2 = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 200))
    k, rows = data.draw(st.integers(1, min(n1, n2, 20))), data.draw(st.integers(1, 2))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    high = data.draw(st.sampled_from([1, 3, 50, 100]))
    scores1, scores2 = (torch.randint(-2, high, (rows, n), generator=g).to(dtype) for n in (n1, n2))
    want, slots = defined(scores1, scores2, k)
    limit, kernels.FEW_ROWS = kernels.FEW_ROWS, data.draw(st.sampled_from([0, 1024]))
    try:
        scores, indices = kernels.forward(scores1, scores2, k)
    finally:
        kernels.FEW_ROWS = limit
    assert torch.equal(scores, want)
    assert torch.equal(indices, slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "n1", "n2", "k"), [(3, 5, 7, 6), (40, 60, 33, 9), (2, 3, 1000, 40), (1, 1, 1, 1)])
def test_backward(kernels, rows, n1, n2, k, dtype):
    """Few keys for k, so each occurs often. The sums equal those of a loop over k, bit for bit in fp32."""
    g = torch.Generator().manual_seed(rows)
    indices = torch.randint(0, n1 * n2, (2, rows, k), generator=g)
    grad = torch.randn(2, rows, k, generator=g).to(dtype)
    got = kernels.backward(grad, indices, n1, n2)
    for one, keys, n in zip(got, (indices // n2, indices % n2), (n1, n2), strict=True):
        want = torch.zeros(2, rows, n, dtype=torch.float32).scatter_add_(-1, keys, grad.float())
        assert one.dtype == dtype
        assert dtype != torch.float32 or torch.equal(one, want)  # the interpreter cuts off where a device rounds to bf16
        exact = torch.zeros(2, rows, n, dtype=torch.float64).scatter_add_(-1, keys, grad.double())
        assert_norm_close(one, exact, k)
    assert all(map(torch.equal, got, kernels.backward(grad, indices, n1, n2)))


def test_backward_of_strided_and_large_slots(kernels):
    indices = torch.tensor([[65536 * 65536 - 1, 0, 65536], [5, 65535, 2**31]])
    grad = torch.tensor([[1.0], [2.0]]).expand(2, 3)
    grad1, grad2 = kernels.backward(grad, indices, 65536, 65536)
    want1, want2 = torch.zeros(2, 65536), torch.zeros(2, 65536)
    want1[0, [65535, 0, 1]], want2[0, [65535, 0]] = 1.0, torch.tensor([1.0, 2.0])
    want1[1, [0, 32768]], want2[1, [5, 65535, 0]] = torch.tensor([4.0, 2.0]), 2.0
    assert torch.equal(grad1, want1)
    assert torch.equal(grad2, want2)


@pytest.fixture
def long_chunks(kernels, monkeypatch) -> None:
    """Fewer chunks than the plans have: the interpreter's time is that of its calls."""
    monkeypatch.setattr(kernels, "plan_halves", lambda *_: kernels.Plan(1, 8192, 1, 1))


@pytest.mark.usefixtures("long_chunks")
def test_the_largest_slot(kernels):
    scores = torch.zeros(1, 65536, dtype=torch.bfloat16)
    scores[0, 65535] = 1
    assert kernels.forward(scores, scores, 1)[1].item() == 65536 * 65536 - 1


@pytest.mark.usefixtures("long_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_keys_than_a_narrow_key_holds(kernels, dtype):
    """More than 65,536 keys per half, in one half and in both: wide keys, and with 2^32 slots or more, slots of 64 bits."""
    n = 65536 + 3000
    scores1, scores2 = (scores_of(1, n, dtype, seed).clamp(max=2.0) for seed in range(2))
    scores1[0, -1] = scores2[0, -2] = 4.0
    for one, two in ((scores1, scores2), (scores1, scores2[:, -70:])):
        got = kernels.forward(one, two, 5)
        best1, best2 = (half.float().topk(5).values for half in (one, two))
        want = (best1[:, :, None] + best2[:, None]).flatten(1).topk(5).values
        assert torch.equal(got[0], want)
        assert got[1][0, 0] == (one.shape[1] - 1) * two.shape[1] + two.shape[1] - 2
        sums = one.float().gather(-1, got[1] // two.shape[1]) + two.float().gather(-1, got[1] % two.shape[1])
        assert torch.equal(got[0], sums)
        assert len(set(got[1][0].tolist())) == 5


def test_many_rows_of_wide_keys(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "FEW_ROWS", 0)
    monkeypatch.setattr(kernels, "plan_halves", lambda *_: kernels.Plan(2, 128, 32, 1))
    scores1 = scores_of(3, 65544, torch.bfloat16).clamp(max=2.0)
    scores1[:, [65543, 65540, 7]] = torch.tensor([5.0, 6.0, 5.0], dtype=torch.bfloat16)
    slots = kernels.forward(scores1, torch.zeros(3, 65544, dtype=torch.bfloat16), 3)[1]
    assert slots.tolist() == [[65540 * 65544, 65540 * 65544 + 1, 65540 * 65544 + 2]] * 3
    slots = kernels.forward(scores1, scores1.roll(1, 1), 3)[1]
    assert slots.tolist() == [[65540 * 65544 + 65541, 65540 * 65544, 65540 * 65544 + 8]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n1", "n2", "k"), [(300, 290, 257)])
def test_large_k(kernels, few, n1, n2, k, dtype):
    scores1, scores2 = scores_of(1, n1, dtype), scores_of(1, n2, dtype, seed=1)
    assert_best(scores1, scores2, kernels.forward(scores1, scores2, k), k)


@pytest.mark.parametrize("n", [65, 127, 1001])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_odd_rows(kernels, monkeypatch, n, k):
    """Loads of single scores: other groups than those of wide loads. Few values, so that groups tie."""
    monkeypatch.setattr(kernels, "FEW_ROWS", 0)
    g = torch.Generator().manual_seed(n)
    scores1, scores2 = (torch.randint(-9, 9, (2, n), generator=g).bfloat16() for _ in range(2))
    want, slots = defined(scores1, scores2, k)
    scores, indices = kernels.forward(scores1, scores2, k)
    assert torch.equal(scores, want)
    assert torch.equal(indices, slots)


def test_backward_of_wide_slots(kernels):
    n = 70_000
    indices = torch.tensor([[n * n - 1, 3 * n + 5, n * n - 1]])
    grad1, grad2 = kernels.backward(torch.tensor([[1.0, 2.0, 4.0]]), indices, n, n)
    assert {i: grad1[0, i].item() for i in grad1[0].nonzero().flatten().tolist()} == {3: 2.0, n - 1: 5.0}
    assert {i: grad2[0, i].item() for i in grad2[0].nonzero().flatten().tolist()} == {5: 2.0, n - 1: 5.0}


@pytest.mark.parametrize("k", [1, 2, 3, 32, 300])
def test_candidates_computed_on_the_device(k):
    """Those of torch's way, which takes what the kernels do not."""
    ranks = torch_topk._device_ranks(k, torch.device("cpu"))
    assert tuple(tuple(side.tolist()) for side in ranks) == torch_topk.candidate_ranks(k)


def test_plans_fit_their_kernels(kernels):
    from memrewrite.kernels.triton_topk_plans import check_halves, rounded

    for n in (1, 60, 63, 100, 128, 1000, 1001, 1024, 4096, 8192, 65536, 2**20):
        for k in (1, 4, 7, 32, 64, 200, 256, 300, 2048):
            for dtype, vec in ((torch.float32, 4), (torch.bfloat16, 8), (torch.float16, 1), (torch.float32, 1)):
                for few in (False, True):
                    plan = kernels.plan_halves(n, k, dtype, vec, few)
                    check_halves(plan, rounded(k), n, vec)
                    assert plan.rows & (plan.rows - 1) == plan.chunk & (plan.chunk - 1) == 0


def test_a_measured_plan_is_used(kernels, monkeypatch):
    from memrewrite.kernels import triton_plans

    used = []
    options = kernels.Plan.options
    monkeypatch.setattr(kernels.Plan, "options", lambda plan: used.append(plan) or options(plan))
    scores1, scores2 = (scores_of(5, 64, torch.float32, seed) for seed in range(2))
    half = {"rows": 4, "chunk": 16, "group": 4, "warps": 1}
    pair = {"rows": 2, "chunk": 4, "group": 1, "warps": 1}
    few = kernels.forward(scores1, scores2, 4)
    monkeypatch.setattr(kernels, "FEW_ROWS", 0)
    used.clear()
    with triton_plans.use("topk_half", half), triton_plans.use("topk_pair", pair):
        got = kernels.forward(scores1, scores2, 4)
    assert used == [kernels.Plan(4, 16, 4, 1), kernels.Plan(2, 4, 1, 1)]
    assert all(map(torch.equal, got, few))
    odd = scores_of(2, 33, torch.float32)
    with triton_plans.use("topk_half", half):
        kernels.forward(odd, odd, 4)  # not for single loads, where it need not fit
    for kernel, plan in (
        ("topk_half", half | {"group": 2}),
        ("topk_half", half | {"group": 16}),
        ("topk_half", half | {"chunk": 2, "group": 1}),
        ("topk_half", half | {"warps": 2}),
        ("topk_pair", pair | {"chunk": 8}),
    ):
        with triton_plans.use(kernel, plan), pytest.raises(triton_plans.PlanError, match="Plan"):
            kernels.forward(scores1, scores2, 4)


def test_what_is_refused(kernels):
    half = torch.zeros(2, 300, dtype=torch.bfloat16)
    assert kernels.supports(half, 256) is None
    assert "float64" in kernels.supports(half.double(), 4)
    assert kernels.supports(half, 2048) is None
    assert "k <= 2048" in kernels.supports(half, 2049)
    assert kernels.supports(torch.zeros(1, 65537), 4) is None


def test_compile_variants_use_the_plans_of_the_launchers(kernels):
    compile_variants = list(kernels.compile_variants())
    assert len({variant.name for variant in compile_variants}) == len(compile_variants) == 22
    for variant in compile_variants:
        names = [name for name, kind in variant.signature.items() if kind == "constexpr"]
        assert set(names) == set(variant.constants), variant.name
