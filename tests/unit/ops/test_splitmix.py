from __future__ import annotations

import torch

from posttrain_lib.ops.splitmix import STEP, mixed_

#: the generator's first numbers from seed 0, as its reference implementation in C gives them
KNOWN = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_the_generators_numbers() -> None:
    numbers = torch.arange(1, 4)
    assert mixed_(numbers * STEP).tolist() == [number - (number >> 63 << 64) for number in KNOWN]


def test_no_two_numbers_are_mixed_alike() -> None:
    """Nor one and its complement, which a shift of the sign would mix alike."""
    numbers = torch.cat([torch.arange(1000), ~torch.arange(1000), torch.ones(64).long() << torch.arange(64)]).unique()
    assert len(mixed_(numbers.clone()).unique()) == len(numbers)
