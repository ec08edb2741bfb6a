"""What to know of a source's pictures under a policy: those of which nothing is left, or less than there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from m2_encoder.data.images.rgb import FLAT, NOT_BLENDED, NOT_SCALED, NOT_TURNED
from m2_encoder.pictures import PicturePolicy


def advise_pictures(
    effects: Mapping[str, int], *, decoded: int, flat: Sequence[str], policy: PicturePolicy
) -> Iterator[str]:
    """Warnings with what mends them.

    Args:
        effects: pictures by what the policy does to them, of `rgb.EFFECTS`.
        decoded: pictures that were looked at.
        flat: names of some that become one flat colour.
        policy: of the check, or of the run.
    """
    if count := effects.get(FLAT, 0):
        fix = "if they are drawn in white on a transparent ground, model.pictures={background: grey} shows them"
        if effects.get(NOT_BLENDED) or effects.get(NOT_SCALED):
            fix = "model.pictures=standard blends alpha and scales 16 bits"
        elif policy.background not in ("white", "dropped"):
            fix = f"if they are drawn in {policy.background} on a transparent ground, another background shows them"
        yield (
            f"{count:,} of {decoded:,} decoded pictures become one flat colour, which shows nothing "
            f"({', '.join(flat)}): leave them out; {fix}"
        )
    lost = {name: effects[name] for name in (NOT_TURNED, NOT_BLENDED, NOT_SCALED) if name in effects}
    if lost:
        what = ", ".join(f"{count:,} {name}" for name, count in lost.items())
        yield (
            f"of {decoded:,} decoded pictures, by this policy: {what}; viewers show them otherwise, and so does "
            "model.pictures=standard"
        )
