"""The settings of a steered model, which may be assigned while it is in use."""

from __future__ import annotations

import torch

from svdecode.ops.setting import Setting

_LARGEST = torch.finfo(torch.float32).max


def _part(name: str) -> property:
    def get(self: Settings) -> float | str:
        return getattr(self.settings, name)

    def set_(self: Settings, value: float | str) -> None:
        self.settings = self.settings._replace(**{name: value})

    return property(get, set_, doc=f"`settings.{name}`.")


class Settings:
    """`settings`, an immutable `svdecode.Setting`, and its parts."""

    @property
    def settings(self) -> Setting:
        """How the model is steered; TypeError or ValueError where an assigned value is out of range."""
        return self.__dict__["_settings"]

    @settings.setter
    def settings(self, value: Setting) -> None:
        setting = Setting(*value).check()
        if abs(setting.mu) > _LARGEST:
            raise ValueError(f"mu must be a float32 number, at most {_LARGEST:.4g}, got {setting.mu:.4g}")
        self.__dict__["_settings"] = setting

    mu = _part("mu")
    alpha = _part("alpha")
    penalty = _part("penalty")
    direction = _part("direction")
