"""Soft caps, sinks, values of another width and cached generation on a CUDA device, against the readable version on the
CPU.

Needs PyTorch, numpy and pytest alone: a bare GPU machine runs it (``python infra/gpu_suite.py``).

Tolerances as in ``test_ops_cuda.py``: float32 2e-5 of the largest entry, bfloat16 4 of its epsilons.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from posttrain_lib.ops.attention import DocumentLayout, has_fused_varlen, packed_attention  # noqa: E402
from posttrain_lib.ops.cache import KeyValueCache  # noqa: E402
from posttrain_lib.ops.reference import packed_attention_reference  # noqa: E402
from posttrain_lib.schema.shared_prefix import SharedPrefixes  # noqa: E402
from tests.oracles.prefix_tree import documents, row_of  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

LENGTHS = (5, 1, 130, 64, 300)
TREE = ((-1, 0, 200), (0, 130, 70), (0, 200, 1), (1, 199, 300), (-1, 0, 5))
RELATIVE = {torch.float32: 2e-5, torch.bfloat16: 4 * 2.0**-8}
DTYPES = pytest.mark.parametrize("dtype", list(RELATIVE), ids=["fp32", "bf16"])
OPTIONS = pytest.mark.parametrize(
    ("softcap", "sinks", "value_width"),
    [(None, True, 64), (2.0, False, 64), (2.0, True, 32), (None, False, 32)],
    ids=["sinks", "softcap", "all", "narrow values"],
)
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _full_float32() -> None:
    """No TF32: the float32 bounds above are float32's."""
    torch.backends.cuda.matmul.allow_tf32 = False


def boundaries(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def inputs(tokens: int, value_width: int, sinks: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """Rounded to the dtype, so that both sides start from the same numbers."""
    shapes = [(tokens, 8, 64), (tokens, 2, 64), (tokens, 2, value_width), *[(8,)] * sinks]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """Largest difference against the largest entry."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    worst, size = float((found - expected).abs().max()), float(expected.abs().max())
    assert torch.isfinite(found).all(), f"{what}: not finite"
    assert worst <= RELATIVE[dtype] * size, f"{what}: off by {worst:.3g} where entries reach {size:.3g}"


@DTYPES
@OPTIONS
@pytest.mark.parametrize("window", [None, 17])
def test_packed_attention_and_its_gradients(
    dtype: torch.dtype, softcap: float | None, sinks: bool, value_width: int, window: int | None
) -> None:
    start = inputs(sum(LENGTHS), value_width, sinks, dtype)
    pull = torch.randn(sum(LENGTHS), 8, value_width).to(dtype)
    results = []
    for attend, move in (
        (packed_attention_reference, lambda value: value.double()),
        (packed_attention, lambda value: value.to(DEVICE)),
    ):
        rows = [move(value).requires_grad_() for value in start]
        options = {"scale": 0.125, "window": window, "softcap": softcap, "sinks_N": rows[3] if sinks else None}
        output = attend(*rows[:3], boundaries(LENGTHS).to(rows[0].device), max(LENGTHS), **options)
        results.append([output, *torch.autograd.grad(output, rows, move(pull))])
    assert results[1][0].dtype == dtype
    names = ("output", *(f"gradient of {name}" for name in ("query", "key", "value", "sinks")))
    for name, expected, found in zip(names, *results, strict=False):
        assert_near(found, expected, dtype, name)


@DTYPES
@OPTIONS
@pytest.mark.parametrize("window", [None, 150])
def test_shared_beginnings(
    dtype: torch.dtype, softcap: float | None, sinks: bool, value_width: int, window: int | None
) -> None:
    cu_seqlens, positions, parents = row_of(TREE)
    start = inputs(len(positions), value_width, sinks, dtype)
    exact = [value.double() for value in start]
    options = {"scale": 0.125, "window": window, "softcap": softcap}
    alone = []
    for document, (_, cut, _) in zip(documents(TREE), TREE, strict=True):
        rows = (value[document] for value in exact[:3])
        logits = exact[3] if sinks else None
        ends = boundaries((len(document),))
        alone.append(packed_attention_reference(*rows, ends, len(document), sinks_N=logits, **options)[cut:])

    prefixes = SharedPrefixes.of(cu_seqlens, positions, parents).map(lambda array: torch.from_numpy(array).to(DEVICE))
    fused = has_fused_varlen(torch.device(DEVICE), dtype)
    layout = DocumentLayout.of(cu_seqlens.to(DEVICE), int(cu_seqlens.diff().max()), fused=fused, prefixes=prefixes)
    moved = [value.to(DEVICE) for value in start]
    logits = moved[3] if sinks else None
    found = packed_attention(*moved[:3], layout, layout.max_seqlen, sinks_N=logits, **options)
    assert_near(found, torch.cat(alone), dtype, "output")


def test_other_lengths_are_not_other_kernels() -> None:
    """FlexAttention is compiled for any lengths: a few graphs at first, none later."""
    sinks = torch.randn(8, device=DEVICE, dtype=torch.bfloat16)

    def run(lengths: tuple[int, ...]) -> int:
        query, key, value = (item.to(DEVICE) for item in inputs(sum(lengths), 64, False, torch.bfloat16))
        ends = boundaries(lengths).to(DEVICE)
        packed_attention(query, key, value, ends, max(lengths), scale=0.125, softcap=3.0, sinks_N=sinks)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    for lengths in ((300, 100), (260, 260, 1)):
        before = run(lengths)
    assert [run(lengths) for lengths in ((700,), (5,) * 80, (129, 127, 300), (1000, 24, 7))] == [before] * 4


@DTYPES
@OPTIONS
@pytest.mark.parametrize("window", [None, 17])
def test_cached_is_uncached(
    dtype: torch.dtype, softcap: float | None, sinks: bool, value_width: int, window: int | None
) -> None:
    """Prompts of different lengths, then single tokens, then one sequence leaves."""
    lengths, more = (40, 3, 130), 6
    start = [inputs(length + more, value_width, False, dtype) for length in lengths]
    logits = torch.randn(8).to(dtype) if sinks else None
    options = {"scale": 0.125, "window": window, "softcap": softcap}
    expected = [
        packed_attention_reference(
            *(value.double() for value in rows),
            boundaries((len(rows[0]),)),
            len(rows[0]),
            sinks_N=None if logits is None else logits.double(),
            **options,
        )
        for rows in start
    ]
    cache, alive, fed = KeyValueCache(3, max(lengths) + more), [0, 1, 2], [0, 0, 0]
    for step in range(more + 1):
        if step == 3:
            cache.drop([0, 2])
            alive = [0, 2]
        counts = tuple(lengths) if step == 0 else (1,) * len(alive)
        layout = DocumentLayout.of(boundaries(counts).to(DEVICE), max(counts), cache=cache)
        runs = [
            [value[fed[number] : fed[number] + count].to(DEVICE) for value in start[number]]
            for number, count in zip(alive, counts, strict=True)
        ]
        query, key, value = (torch.cat(parts) for parts in zip(*runs, strict=True))
        cache.append(0, key, value, layout)
        moved = None if logits is None else logits.to(DEVICE)
        found = cache.attend(0, query, layout, sinks_N=moved, **options)
        for number, count, part in zip(alive, counts, found.split(counts), strict=True):
            assert_near(part, expected[number][fed[number] : fed[number] + count], dtype, f"step {step}")
            fed[number] += count
        cache.advance(counts)
