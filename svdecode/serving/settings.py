"""How a served model is steered, as it travels through vLLM's configuration: one dictionary of plain values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from svdecode.ops.setting import Setting
from svdecode.serving.names import KEY


class Served(NamedTuple):
    """An adapter, and how its model is steered."""

    adapter: Path
    setting: Setting
    floor: bool = True
    """Whether tokens outside the kept set keep the adapted model's order, far below (`svdecode.ops.floor`)."""

    def to_config(self) -> dict[str, Any]:
        """What goes into the model's configuration under `KEY`, fit for JSON."""
        values = {"adapter": str(self.adapter), **self.setting._asdict(), "floor": self.floor}
        if values["penalty"] == -math.inf:
            del values["penalty"]  # the default, which JSON has no number for
        return values

    @classmethod
    def of(cls, hf_config: Any) -> Served:
        """Read it from a model's configuration.

        Raises:
            ValueError: it is missing, or one of its values is unknown or out of range.
        """
        values = dict(getattr(hf_config, KEY, None) or {})
        if not isinstance(values.get("adapter"), str) or "mu" not in values:
            raise ValueError(
                "a steered architecture needs its settings: --hf-overrides "
                f'\'{{"{KEY}": {{"adapter": "FOLDER", "mu": 0.5}}}}\' (svdecode serve writes it)'
            )
        adapter, floor = values.pop("adapter"), values.pop("floor", True)
        unknown = sorted(set(values) - set(Setting._fields))
        if unknown:
            raise ValueError(
                f"{KEY}: {unknown[0]} is unknown; its settings are adapter, floor, {', '.join(Setting._fields)}"
            )
        if not isinstance(floor, bool):
            raise ValueError(f"{KEY}: floor must be true or false, got {floor!r}")
        if "penalty" in values:
            values["penalty"] = float(values["penalty"])
        return cls(Path(adapter), Setting(**values).check(), floor)
