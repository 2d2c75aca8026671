"""Memory that packed steps are laid out in: shared with nobody who still looks at it."""

from __future__ import annotations

import numpy as np
import torch

from posttrain_lib.data.assemble import PackedArrays


def test_a_block_is_used_again_when_nobody_holds_a_view_of_it() -> None:
    arrays = PackedArrays.empty(1237)  # a size that nothing else here asks for
    place = arrays.token_ids.__array_interface__["data"][0]
    del arrays
    assert PackedArrays.empty(1237).token_ids.__array_interface__["data"][0] == place


def test_a_slice_or_a_tensor_keeps_its_block() -> None:
    held = PackedArrays.empty(1239)
    held.token_ids[:], held.loss_weights[:] = 7, 0.5
    part, tensor = held.token_ids[5:9], torch.from_numpy(held.loss_weights[100:200])
    del held
    for _ in range(8):  # more than are kept
        other = PackedArrays.empty(1239)
        other.token_ids[:], other.loss_weights[:] = 0, 0.0
    assert part.tolist() == [7] * 4
    assert torch.equal(tensor, torch.full((100,), 0.5))


def test_blocks_in_hand_are_parted() -> None:
    all_arrays = [PackedArrays.empty(1241) for _ in range(8)]
    for number, arrays in enumerate(all_arrays):
        arrays.positions[:] = number
    assert [np.unique(arrays.positions).tolist() for arrays in all_arrays] == [[number] for number in range(8)]
