"""What a path of a run file names."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain_lib.errors import ConfigError
from steps.places import local_folder


def test_a_path_is_a_folder_a_hub_id_or_a_mistake(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path), "model.path") == tmp_path
    assert local_folder("owner/name@main", "model.path") is None
    for wrong in ("/nope/x", "./owner/name", "a/b/c", "name"):
        with pytest.raises(ConfigError, match="does not exist") as caught:
            local_folder(wrong, "model.path")
        assert caught.value.where == "model.path"
