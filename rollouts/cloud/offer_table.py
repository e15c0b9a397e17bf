"""Offers as text and as JSON."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rollouts.cloud.machine_types import Offer
from rollouts.view.tables import columns

SHOWN_MAX = 25
OTHER_KINDS = ("another GPU", "another region", "no price")
HEADER = [
    "provider",
    "gpu",
    "gpus",
    "GB each",
    "$/hour",
    "$/gpu/hour",
    "region",
    "spot",
    "reliability",
    "stock",
]


def offer_rows(offers: Sequence[Offer]) -> list[list[str]]:
    """Return the cells of each offer."""
    return [
        [
            offer.provider,
            offer.gpu_type,
            str(offer.gpus),
            "-" if offer.vram_gb is None else f"{offer.vram_gb:g}",
            f"{offer.price_per_hour:.2f}",
            f"{offer.price_per_gpu_hour:.2f}",
            offer.region or "-",
            "spot" if offer.spot else "-",
            "-" if offer.reliability is None else f"{offer.reliability:.2f}",
            offer.stock,
        ]
        for offer in offers
    ]


def offers_text(offers: Sequence[Offer], *, nearest: int = 0) -> str:
    """Return the table of what fits, and how many were left out for which reason.

    `nearest`: so many of those that were left out are listed, first those that fit but for their price or stock.
    """
    fitting = [offer for offer in offers if not offer.left_out]
    lines = [columns([HEADER, *offer_rows(fitting[:SHOWN_MAX])]) if fitting else "no machine fits"]
    if more := len(fitting) - SHOWN_MAX:
        lines += [f"… and {more} more, dearer ones"] if more > 0 else []
    reasons = Counter(f"{offer.provider}: {offer.left_out}" for offer in offers if offer.left_out)
    lines += [f"left out  {count} of {reason}" for reason, count in sorted(reasons.items())]
    if nearest and (near := _nearest(offers)[:nearest]):
        cells = [[*offer_rows([offer])[0], offer.left_out] for offer in near]
        lines += ["nearest, and why each is left out:", columns([[*HEADER, "why not"], *cells])]
    return "\n".join(lines)


def _nearest(offers: Sequence[Offer]) -> list[Offer]:
    """Return what was left out, the right kind of machine first, then by price."""
    out = [offer for offer in offers if offer.left_out]
    return sorted(out, key=lambda offer: (offer.left_out in OTHER_KINDS, offer.price_per_hour))


def offer_json(offer: Offer) -> dict[str, Any]:
    """Return an offer as a JSON object."""
    names = (
        "provider",
        "offer_id",
        "gpu_type",
        "gpus",
        "vram_gb",
        "price_per_hour",
        "price_per_gpu_hour",
        "region",
    )
    more = ("spot", "reliability", "stock", "left_out")
    return {name: getattr(offer, name) for name in (*names, *more)}
