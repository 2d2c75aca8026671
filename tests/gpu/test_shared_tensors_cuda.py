"""Tensors into another process by CUDA IPC, and the digest of both ends on the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

from posttrain_lib.adapters.vllm_channel import Channel  # noqa: E402
from posttrain_lib.errors import RolloutError  # noqa: E402
from posttrain_lib.rl import shared_tensors  # noqa: E402
from posttrain_lib.rl.sync_guard import digest_of  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

#: seconds for an answer that comes
LONG = 120.0
SIZE = 1 << 20


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Channel]:
    monkeypatch.setattr(shared_tensors, "_BUFFER", SIZE)
    channel = Channel("tests.support.answering", {}, torch.device("cuda", 0))
    yield channel
    channel.close()


def weights_of(seed: int) -> dict[str, torch.Tensor]:
    """Views, odd sizes, several dtypes, many buckets, one tensor that is larger than a bucket, one on the host."""
    torch.manual_seed(seed)
    return {
        "view": torch.randn(3, 4, device="cuda").t(),
        "odd": torch.randn(7, device="cuda").bfloat16(),
        "none": torch.tensor(3 + seed, device="cuda"),
        **{f"layer {number}": torch.randn(300, 500, device="cuda") for number in range(9)},
        "large": torch.randn(3 * SIZE, device="cuda").bfloat16(),
        "behind": torch.randn(5, 3, device="cuda").half(),
        "host": torch.randn(100),
    }


def test_tensors_arrive_as_they_are(channel: Channel) -> None:
    """Again and again, into a buffer that was opened before."""
    for seed in range(3):
        weights = weights_of(seed)
        host = {name: tensor.cpu() for name, tensor in weights.items()}
        assert channel.push("digest", weights.items(), seconds=LONG) == digest_of(host.items())


def test_a_push_that_ends_in_an_error_harms_no_later_one(channel: Channel) -> None:
    weights = weights_of(0)

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from weights.items()
        raise ValueError("no more")

    with pytest.raises(RolloutError, match="enough"):
        channel.push("half", weights.items(), seconds=LONG)
    with pytest.raises(ValueError, match="no more"):
        channel.push("digest", broken(), seconds=LONG)
    assert channel.push("digest", weights.items(), seconds=LONG) == digest_of(
        (name, tensor.cpu()) for name, tensor in weights.items()
    )


def test_a_digest_is_the_same_wherever_the_tensors_are() -> None:
    weights = weights_of(1)
    known = digest_of(weights.items())
    assert digest_of((name, tensor.cpu()) for name, tensor in weights.items()) == known
    weights["large"][SIZE] += 1
    assert digest_of(weights.items()) != known
