"""The registry; what the SFT loss computes is tested with the step (tests/unit/training)."""

import pytest

from posttrain_lib.errors import ConfigError
from posttrain_lib.losses import LOSSES, build_loss
from posttrain_lib.losses.sft import SFTLoss


def test_every_registered_loss_can_be_built() -> None:
    for name in LOSSES:
        assert callable(build_loss(name))
    assert isinstance(build_loss("sft", {}), SFTLoss)


def test_a_loss_from_outside() -> None:
    assert isinstance(build_loss("posttrain_lib.losses.sft:SFTLoss"), SFTLoss)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stf", None, "did you mean 'sft'"),
        ("nowhere:Loss", None, "cannot be imported"),
        ("posttrain_lib.losses.sft:Nothing", None, "cannot be imported"),
        ("sft", {"temperature": 2}, "temperature"),
    ],
)
def test_mistakes_are_config_errors(name: str, options: dict | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_loss(name, options)
