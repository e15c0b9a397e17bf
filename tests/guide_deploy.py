"""`deploy` as the guide's pages call it: the real one, but some `--remote` names are hosts that were recorded once, and
the clouds are stand-ins.

Only `--plan` and a look at the host work there: nothing is sent.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path.cwd()))

import deploy
from rollouts.remote import commands, looks
from rollouts.remote.host import facts
from rollouts.remote.host import open as opening

SEEN = Path(__file__).parent / "remote" / "hosts_seen"
RECORDED = {"gpu-7": "l40s", "old-gpu": "driver550"}
real_transport, real_facts = opening.open_transport, facts.gather_facts


def open_transport(remote: str | None, **options: Any) -> Any:
    if remote in RECORDED:
        return SimpleNamespace(target=remote, close=lambda: None)
    return real_transport(remote, **options)


def gather_facts(transport: Any, **asked: Any) -> facts.HostFacts:
    if transport.target in RECORDED:
        lines = (SEEN / f"{RECORDED[transport.target]}.txt").read_text().splitlines()
        return facts.parse_facts([line.partition("=")[::2] for line in lines])
    return real_facts(transport, **asked)


def rent_from_stand_ins() -> None:
    from tests.cloud.conftest import CLOUDS, variables

    clouds = {name: cloud() for name, cloud in CLOUDS.items()}
    os.environ.update(variables(clouds, Path.home()))


def main() -> None:
    if {"offers", "machines", "rented.py"} & {*sys.argv}:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        rent_from_stand_ins()
    for module in (commands, looks):
        vars(module).update(open_transport=open_transport, gather_facts=gather_facts)
    deploy.main()


if __name__ == "__main__":
    main()
