"""What contract tests of models share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.played_models import Player


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where jobs have their folders."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def own_ray(models: Path) -> Iterator[None]:
    from posttrain_lib.compute.ray_session import ray_session  # a bare GPU machine runs the engine's contract without

    with ray_session(models / "ray", None, 2):
        yield


@pytest.fixture(params=["fake", "here", pytest.param("actors", marks=pytest.mark.slow)])
def played(request: pytest.FixtureRequest, models: Path) -> Player:
    """Policy and reference of each kind."""
    from tests.support.played_models import player  # reads run files, which a bare GPU machine cannot

    if request.param == "actors":
        request.getfixturevalue("own_ray")
    return player(request.param, models)
