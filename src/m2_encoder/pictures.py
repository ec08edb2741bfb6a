"""What the pixels of a picture file are, beyond its bytes: one policy for training, evaluation and use of a model.

It is part of the model's configuration (`model.pictures`) and of its export.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Literal

from m2_encoder.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PicturePolicy:
    """How pictures become RGB of 8 bits.

    Attributes:
        background: what transparent pixels are blended on; "dropped": alpha is dropped, their hidden colours appear.
        orientation: whether the orientation that EXIF or XMP say is obeyed, as every viewer does.
        depth: whether grey levels of 16 and 32 bits are scaled to 8, see `images.rgb.scale_levels`, or clipped at 255.

    Raises:
        UserError: for another value.
    """

    background: Literal["white", "grey", "black", "dropped"] = "white"
    orientation: Literal["obeyed", "ignored"] = "obeyed"
    depth: Literal["scaled", "clipped"] = "scaled"

    def __post_init__(self) -> None:
        for name, annotation in typing.get_type_hints(type(self)).items():
            if (value := getattr(self, name)) not in (allowed := typing.get_args(annotation)):
                raise UserError(f"must be one of {', '.join(allowed)}", key=name, value=value)

    def with_orientation(self, obeyed: bool | None) -> PicturePolicy:
        """The same policy, or one that obeys or ignores the orientation."""
        if obeyed is None:
            return self
        return dataclasses.replace(self, orientation="obeyed" if obeyed else "ignored")

    def to_dict(self) -> dict[str, str]:
        """Plain values by name, for JSON."""
        return dataclasses.asdict(self)

    def to_setting(self) -> str | dict[str, str]:
        """What `read_policy` reads: its name, or the values of one without."""
        return next((name for name, policy in POLICIES.items() if policy == self), self.to_dict())

    def __str__(self) -> str:
        name = self.to_setting()
        alpha = "alpha dropped" if self.background == "dropped" else f"alpha on {self.background}"
        what = f"orientation {self.orientation}, {alpha}, 16 bits {self.depth}"
        return f"{name} ({what})" if isinstance(name, str) else what


STANDARD: Final = PicturePolicy()
"""Of models trained here."""

OFFICIAL: Final = PicturePolicy(background="dropped", orientation="ignored", depth="clipped")
"""Of the official code, and so of the official weights."""

OLDER: Final = PicturePolicy(background="dropped", orientation="obeyed", depth="clipped")
"""Of models that were trained here before there was a policy."""

POLICIES: Final[Mapping[str, PicturePolicy]] = MappingProxyType(
    {"standard": STANDARD, "official": OFFICIAL, "older": OLDER}
)

POLICY_RULE: Final = (
    f"one of {', '.join(POLICIES)}, or a mapping with background=white|grey|black|dropped, "
    "orientation=obeyed|ignored and depth=scaled|clipped"
)
"""What a setting may be, in words; what a mapping leaves out is as in `standard`."""


def read_policy(setting: Any) -> PicturePolicy:
    """The policy that a setting names.

    Raises:
        UserError: for anything but a name of `POLICIES`, a mapping of values, or a policy.
    """
    if isinstance(setting, PicturePolicy):
        return setting
    try:
        return PicturePolicy(**setting) if isinstance(setting, Mapping) else POLICIES[setting]
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"must be {POLICY_RULE}", key="pictures", value=setting) from error


def is_policy(setting: Any) -> bool:
    """Whether `read_policy` reads it."""
    try:
        read_policy(setting)
    except UserError:
        return False
    return True


def bind_pictures(function: Callable[..., Any], pictures: PicturePolicy) -> Callable[..., Any]:
    """The function with the argument `pictures`, if it takes one."""
    return partial(function, pictures=pictures) if "pictures" in inspect.signature(function).parameters else function
