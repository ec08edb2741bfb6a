"""What to know of a source's pictures under a policy: those of which nothing is left, or less than there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from m2_encoder.data.images.rgb import FLAT, NOT_BLENDED, NOT_SCALED, NOT_TURNED
from m2_encoder.data.inspect.survey import Survey
from m2_encoder.errors import abridge

_MAX_NAMES: Final = 5


def advise_pictures(survey: Survey) -> Iterator[str]:
    """Warnings with what mends them, by the policy that the source was looked at with."""
    policy = survey.options.pictures
    effects = sum((item.effects for item in survey.shards), Counter[str]())
    decoded = sum(item.decoded for item in survey.shards)
    if count := effects[FLAT]:
        names = [abridge(name, 40) for item in survey.shards for name in item.flat][:_MAX_NAMES]
        fix = "if they are drawn in white on a transparent ground, model.pictures={background: grey} shows them"
        if effects[NOT_BLENDED] or effects[NOT_SCALED]:
            fix = "model.pictures=standard blends alpha and scales 16 bits"
        elif policy.background not in ("white", "dropped"):
            fix = f"if they are drawn in {policy.background} on a transparent ground, another background shows them"
        yield (
            f"{count:,} of {decoded:,} decoded pictures become one flat colour, which shows nothing "
            f"({', '.join(names)}): leave them out; {fix}"
        )
    lost = [f"{effects[name]:,} {name}" for name in (NOT_TURNED, NOT_BLENDED, NOT_SCALED) if effects[name]]
    if lost:
        yield (
            f"of {decoded:,} decoded pictures, by this policy: {', '.join(lost)}; viewers show them otherwise, and so "
            "does model.pictures=standard"
        )
