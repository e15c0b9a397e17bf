"""Offers judged and ordered: pure. And the terms in which a search may be written."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rollouts.cloud.machine_types import PRIVATE_NETWORKS, MachineNeeds, Offer


@dataclass(frozen=True)
class Condition:
    """What an offer has to fulfil: `vram_gb >= 24`, `price_per_hour <= 2`, `gpu_type.contains("H100")`, joined by &."""

    words: str
    holds: Callable[[Offer], bool]

    def __and__(self, other: "Condition") -> "Condition":
        return Condition(
            f"{self.words} and {other.words}",
            lambda offer: self.holds(offer) and other.holds(offer),
        )

    def __bool__(self) -> bool:
        raise TypeError(
            f"`{self.words}` is a condition for a search: join conditions with &, in parentheses"
        )


@dataclass(frozen=True)
class NumberTerm:
    """A number of an offer, to be compared. An offer whose provider does not say it fulfils nothing."""

    name: str
    value: Callable[[Offer], float | None]

    def _condition(self, sign: str, limit: float, test: Callable[[float], bool]) -> Condition:
        def holds(offer: Offer) -> bool:
            value = self.value(offer)
            return value is not None and test(value)

        return Condition(f"{self.name} {sign} {limit:g}", holds)

    def __ge__(self, limit: float) -> Condition:
        return self._condition(">=", limit, lambda value: value >= limit)

    def __gt__(self, limit: float) -> Condition:
        return self._condition(">", limit, lambda value: value > limit)

    def __le__(self, limit: float) -> Condition:
        return self._condition("<=", limit, lambda value: value <= limit)

    def __lt__(self, limit: float) -> Condition:
        return self._condition("<", limit, lambda value: value < limit)


@dataclass(frozen=True)
class TextTerm:
    """A text of an offer, to be looked into."""

    name: str
    value: Callable[[Offer], str]

    def contains(self, part: str) -> Condition:
        """Return the condition that `part` is in it, in any case."""
        return Condition(
            f"{self.name} contains {part!r}", lambda offer: fits(part, self.value(offer))
        )


vram_gb = NumberTerm("vram_gb", lambda offer: offer.vram_gb)
price_per_hour = NumberTerm("price_per_hour", lambda offer: offer.price_per_hour)
gpu_type = TextTerm("gpu_type", lambda offer: offer.gpu_type)


def fits(part: str, name: str) -> bool:
    """Return whether a name holds `part`, in any case and with any sign between words: "rtx 4090" is in RTX_4090."""
    return _plain(part) in _plain(name)


def _plain(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def judged(offer: Offer, wanted: MachineNeeds) -> Offer:
    """Return an offer with the reason why it is left out, if one of these holds."""
    most, memory = wanted.price_per_hour_max, wanted.vram_gb_min
    checks = (
        # one without a price cannot be compared, nor held to a limit
        (offer.price_per_hour > 0, "no price"),
        (
            not wanted.gpu_types or any(fits(part, offer.gpu_type) for part in wanted.gpu_types),
            "another GPU",
        ),
        (
            memory is None or (offer.vram_gb or 0.0) >= 0.95 * memory,
            f"less than {memory:g} GB" if memory else "",
        ),
        (wanted.spot or not offer.spot, "a spot machine"),
        (
            wanted.hosts == 1 or offer.provider in PRIVATE_NETWORKS,
            "no private network between its single machines",
        ),
        (
            not wanted.regions or any(fits(part, offer.region) for part in wanted.regions),
            "another region",
        ),
        (
            most is None or offer.price_per_hour <= most,
            f"over ${most:g} an hour" if most is not None else "",
        ),
    )
    for ok, reason in checks:
        offer = offer if ok else offer.without(reason)
    return offer


def ordered(offers: Iterable[Offer], preferred: Iterable[str] = ()) -> list[Offer]:
    """Return offers as they would be taken: those that fit first, by price; of equal ones the preferred provider's."""
    places = {name: place for place, name in enumerate(preferred)}
    return sorted(
        offers,
        key=lambda offer: (
            offer.left_out != "",
            round(offer.price_per_hour, 2),
            places.get(offer.provider, len(places)),
            -(offer.reliability or 0.0),
            offer.offer_id,
        ),
    )
