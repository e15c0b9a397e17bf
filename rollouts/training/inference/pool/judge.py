"""Decide which answers count: those of an engine that was started again meanwhile do not."""

from collections.abc import Iterable, Sequence

from rollouts.training.inference.http import EngineLost, Generation
from rollouts.training.inference.pool.replica import Replica


class Judge:
    """Judges the answer to one request. It is made before the request is sent, to one of `replicas`."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas
        self._settled = [replica.given.settled for replica in replicas]
        self._aborts = self._aborts_now()

    def check(self, rows: Iterable[Generation]) -> None:
        """Raise EngineLost for rows by other weights than the engines had, or were given meanwhile.

        Raise it too for an abort that the caller did not ask for.
        """
        who = " or ".join(map(str, self._replicas))
        pairs = zip(self._replicas, self._settled, strict=True)
        allowed = [
            version for replica, settled in pairs for version in replica.given.since(settled)
        ]
        for row in rows:
            sampled_with = {row.weight_version, *(span["version"] for span in row.weight_versions)}
            foreign = sampled_with - {*allowed, ""}  # "": no token was sampled
            if allowed and foreign:
                found = ", ".join(sorted(foreign))
                raise EngineLost(
                    f"{who}: sampled with weights {found}; was given {allowed[-1]}: it started anew"
                )
            if row.finish_reason == "abort" and self._aborts == self._aborts_now():
                raise EngineLost(f"{who}: gave up a request: {row.finish_detail.get('message')}")

    def _aborts_now(self) -> int:
        return sum(replica.aborts for replica in self._replicas)
