"""What every message between roles is: frozen, without unknown fields, floats kept as they are."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Wire(BaseModel):
    # A loss that is not finite must survive JSON: as the string "NaN", which pydantic reads back as a float.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
