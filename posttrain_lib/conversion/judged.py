"""The family under judgement, where the registry finds it: made of data, it runs no line of a proposal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.conversion.spec_data import FamilyData
from posttrain_lib.models.families import FAMILIES, Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.spec import DecoderConfig

FAMILY: Family


def register(family: FamilyData, hf_config: Mapping[str, Any]) -> None:
    """Make what a proposal said of this config.json the family of its ``model_type``, in this process."""

    def read_config(fields: ConfigReader) -> DecoderConfig:
        fields.skip(*hf_config)  # the proposal has accounted for its fields
        return family.config

    global FAMILY
    FAMILY = Family(
        str(hf_config["model_type"]),
        str((hf_config.get("architectures") or [""])[0]),
        read_config,
        family.rules,
        family.sharding_plan,
        family.left_alone,
    )
    FAMILIES[FAMILY.model_type] = f"{__name__}:FAMILY"
