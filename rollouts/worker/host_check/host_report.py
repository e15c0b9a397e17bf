"""Answer one question of `deploy doctor`: it comes as JSON over stdin, and the answer is one line of JSON."""

import json
import os
import sys
import tempfile
import time
from typing import Any

from rollouts.worker.host_check.cards import cards_row
from rollouts.worker.host_check.disks import disk_rows
from rollouts.worker.host_check.network import network_row
from rollouts.worker.host_check.whole_machine import machine_row, owners

PREFIX = "health="
SHM = "/dev/shm"


def report(question: dict[str, Any]) -> dict[str, Any]:
    """Look at everything. The question: {home, env (of the config), token, pids (on the cards), models}."""
    os.environ.update(question["env"])
    environment = dict(os.environ) | ({"HF_TOKEN": question["token"]} if question["token"] else {})
    places = {"home": question["home"], "tmp": tempfile.gettempdir()}
    places |= {"shm": SHM} if os.path.isdir(SHM) else {}
    return {
        **machine_row(),
        **cards_row(),
        **network_row(environment, question["models"]),
        "disks": disk_rows(places),
        "owners": owners(question["pids"]),
    }


def main() -> None:
    began = time.time()
    answer = report(json.loads(sys.stdin.readline()))
    print(PREFIX + json.dumps({"began_at": began, **answer, "ended_at": time.time()}), flush=True)
