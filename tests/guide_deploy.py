"""`deploy` as the guide's pages call it: the real one, but some `--remote` names are hosts that were recorded once, and
the clouds are stand-ins.

Only `--plan` and a look at the host work there: nothing is sent.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path.cwd()))

import deploy
from rollouts.remote import commands, looks, several_hosts, slurm_start
from rollouts.remote.host import facts, reach
from rollouts.remote.host import open as opening
from rollouts.remote.host.slurm_facts import TOOLS as SLURM_TOOLS
from rollouts.remote.host.slurm_facts import SlurmFacts

SEEN = Path(__file__).parent / "remote" / "hosts_seen"
RECORDED = {"login": "l40s", "gpu-7": "l40s", "gpu-8": "l40s", "old-gpu": "driver550"}
real_transport, real_facts = opening.open_transport, facts.gather_facts


def open_transport(remote: str | None, **options: Any) -> Any:
    if remote in RECORDED:
        return SimpleNamespace(target=remote, close=lambda: None)
    return real_transport(remote, **options)


def gather_facts(transport: Any, **asked: Any) -> facts.HostFacts:
    if transport.target in RECORDED:
        lines = (SEEN / f"{RECORDED[transport.target]}.txt").read_text().splitlines()
        found = facts.parse_facts([line.partition("=")[::2] for line in lines])
        # another machine like it
        return replace(found, host="l40s-2") if transport.target == "gpu-8" else found
    return real_facts(transport, **asked)


def rent_from_stand_ins() -> None:
    from tests.cloud.conftest import CLOUDS, variables

    clouds = {name: cloud() for name, cloud in CLOUDS.items()}
    os.environ.update(variables(clouds, Path.home()))


def find_reach(sides: Sequence[reach.AskedHost]) -> reach.Reach:
    """What hosts of one private network answer."""
    listening = [
        [reach.Place("eth0", f"10.0.0.{n}", (29_100 + n, 29_200 + n))]
        for n in range(4, 4 + len(sides))
    ]
    every = {(place.address, port): 0.0 for (place,) in listening for port in place.ports}
    pairs = [(one, other) for one in range(len(sides)) for other in range(len(sides))]
    return reach.decide_reach([side.name for side in sides], listening, dict.fromkeys(pairs, every))


def ask_slurm(*_login: Any) -> SlurmFacts:
    """What a cluster's login host answers."""
    return SlurmFacts(SLURM_TOOLS, ("gpu",), "nfs", "Slurmctld(primary) at login is UP")


def main() -> None:
    vars(slurm_start).update(ask_slurm=ask_slurm, refusal=lambda *_job: (None, ""))
    vars(several_hosts).update(find_reach=find_reach)
    if {"offers", "machines", "rented.py"} & {*sys.argv}:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        rent_from_stand_ins()
    for module in (commands, looks, several_hosts):
        vars(module).update(open_transport=open_transport, gather_facts=gather_facts)
    deploy.main()


if __name__ == "__main__":
    main()
