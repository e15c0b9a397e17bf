"""Which sequences share a forward pass: best-fit decreasing bin packing. Pure; the standard library alone."""

import bisect
from collections.abc import Sequence


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths`, each bin's lengths summing to at most `capacity`; the fullest that fits is taken.

    Longest first, so that few bins are needed (best-fit decreasing: at most 11/9 of the optimum, Johnson 1973). Nothing
    is cut or left out: a sequence longer than `capacity` gets its own bin. Ties keep the order given.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: needs >= 1 token")
    bins: list[list[int]] = []
    # (tokens free, bin), sorted: the first that is large enough is the best fit
    rooms: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        found = bisect.bisect_left(rooms, (lengths[index], -1))
        if found < len(rooms):
            room, chosen = rooms.pop(found)
        else:
            room, chosen = max(capacity, lengths[index]), len(bins)
            bins.append([])
        bins[chosen].append(index)
        bisect.insort(rooms, (room - lengths[index], chosen))
    return bins
