"""What of experts can be dealt out, without a process group; tests/distributed has the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain_lib.errors import ConfigError
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.parallel.experts import check_experts, even_dimension


def test_a_degree_has_to_divide_the_experts_of_every_layer(family_folder: Callable[[str], Path]) -> None:
    config = spec_from_folder(family_folder("qwen3_moe")).config  # six experts; the second layer has none
    for degree in (1, 2, 3, 6):
        check_experts(config, degree)
    with pytest.raises(ConfigError, match="6 experts over 4 ranks") as refusal:
        check_experts(config, 4)
    assert refusal.value.where == "compute.mesh.expert, layer 0"


def test_a_model_without_experts_has_none_to_deal_out(family_folder: Callable[[str], Path]) -> None:
    config = spec_from_folder(family_folder("qwen3")).config
    check_experts(config, 1)
    with pytest.raises(ConfigError, match="no experts"):
        check_experts(config, 2)


def test_whole_experts_are_shared_out_before_features() -> None:
    assert even_dimension((4, 24, 32), 2) == 0
    assert even_dimension((3, 24, 32), 2) == 1
    assert even_dimension((3, 7, 32), 2) == 2
    assert even_dimension((1, 24), 1) == 0
    with pytest.raises(ConfigError, match="3 x 7 x 5 over shard x context / expert = 2 ranks"):
        even_dimension((3, 7, 5), 2)
