"""What a live display says that a run's rented machines have cost: out of the ledger, at any moment."""

from dataclasses import replace
from pathlib import Path

import pytest

from rollouts.cloud.ledger import Ledger, Limits, Terms
from rollouts.cloud.machine_types import Offer, Order
from rollouts.remote import machine_end
from rollouts.remote.machine_end import cost_so_far
from rollouts.run_dir import HOME_VARIABLE

OFFER = Offer(
    provider="runpod",
    offer_id="x",
    gpu_type="H100",
    gpus=1,
    vram_gb=80.0,
    price_per_hour=2.5,
    region="eu",
    spot=False,
    reliability=None,
    stock="high",
)
HOUR = 3600.0


def test_all_machines_of_a_run_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: the cost is that of every machine of the run, from its intent on: two that run, one that ended meanwhile;
    none that was refused, and none of another run. Red with the first machine alone, and with what was known when the
    display began."""
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    now = 1e9
    monkeypatch.setattr(machine_end.time, "time", lambda: now)
    ledger = Ledger()

    def rents(name: str, price: float, run_id: str = "mine") -> None:
        order = Order(
            name=name,
            offer=replace(OFFER, price_per_hour=price),
            public_key="k",
            disk_gib=1,
            image=None,
        )
        terms = Terms(
            run_id=run_id, limits=Limits(hours_max=9, spend_max=99), keep=False, arm=print
        )
        ledger.intend(order, now=now, terms=terms)

    assert cost_so_far("mine")() == ""
    rents("a", 2.5)
    rents("b", 4.0)
    rents("refused", 100.0)
    ledger.note("refused", "refused", reason="no stock")
    rents("other", 50.0, "other")
    told = cost_so_far("mine")
    assert told() == "cost $0.00 so far, $6.50 an hour"
    now += 2 * HOUR
    assert told() == "cost $13.00 so far, $6.50 an hour"
    ledger.note("a", "ended", reason="gone")
    now += HOUR
    assert told() == "cost $17.00 so far, $4.00 an hour"
    ledger.note("b", "ended", reason="done")
    now += HOUR
    assert told() == "cost $17.00 so far, $0.00 an hour"
    assert cost_so_far("mine")() == ""
