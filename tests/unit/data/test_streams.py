"""A stream orders an epoch when it comes to it, and no epoch that it does not come to."""

import numpy as np

from posttrain_lib.data.streams import StoreStream

UNITS = 5


class Orders:
    """Makes a different order for each epoch and remembers which were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, epoch: int) -> np.ndarray:
        self.asked.append(epoch)
        return np.roll(np.arange(UNITS), epoch)


def drained(stream: StoreStream) -> list[int]:
    ids: list[int] = []
    while len(seen := stream.peek()[0]):
        ids += seen.tolist()
        stream.advance(len(seen))
    return ids


def test_going_back_to_the_start_orders_nothing_anew() -> None:
    orders = Orders()
    stream = StoreStream(orders, np.ones(UNITS, np.int32), limit=UNITS)
    start = stream.state()
    first = drained(stream)
    stream.load_state(start)
    assert drained(stream) == first == list(range(UNITS))
    assert orders.asked == [0]


def test_an_epoch_that_is_cut_short_is_ordered_and_none_behind_it() -> None:
    orders = Orders()
    stream = StoreStream(orders, np.ones(UNITS, np.int32), limit=UNITS + 2)
    assert drained(stream) == [0, 1, 2, 3, 4, 4, 0]
    assert orders.asked == [0, 1]
    assert len(stream.peek()[0]) == 0


def test_a_state_of_another_epoch_has_that_epochs_order() -> None:
    stream = StoreStream(Orders(), np.ones(UNITS, np.int32), limit=None)
    stream.load_state({"epoch": 2, "cursor": 1})
    assert stream.peek()[0].tolist() == [4, 0, 1, 2]
    stream.load_state({"epoch": 0, "cursor": 0})
    assert stream.peek()[0].tolist() == [0, 1, 2, 3, 4]
