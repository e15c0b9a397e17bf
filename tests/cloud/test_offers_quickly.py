"""`deploy offers` asks for all at once, and imports nothing that it does not use."""

import subprocess
import sys
from typing import Any

import anyio
import pytest

from rollouts.cloud import CloudError, MachineNeeds
from rollouts.cloud.accounts import find_offers
from rollouts.cloud.provider_api import PAGES_MAX, HttpReply, ProviderApi
from tests.cloud.fakes.prime import ITEMS, item
from tests.cloud.fakes.server import Answer, FakeCloud

Clouds = dict[str, FakeCloud]


@pytest.mark.parametrize("items", [0, 1, 100, 101, 200, 201, 450])
def test_every_page_of_prime(items: int, clouds: Clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: all pages of Prime's offers are read once, the first two at once, since only an answer says how many there
    are. Red with the pages read in turn, and with the first two alone."""
    clouds["prime"].items = [item(f"c{n}", "H100", 80, 2.0) for n in range(items)]  # type: ignore[attr-defined]
    once, flying, most = ProviderApi._once, 0, 0

    async def counted(self: ProviderApi, *args: Any, **options: Any) -> HttpReply:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        try:
            return await once(self, *args, **options)
        finally:
            flying -= 1

    monkeypatch.setattr(ProviderApi, "_once", counted)
    found = anyio.run(find_offers, MachineNeeds(), ["prime"])
    names = [offer.creation["cloud_id"] for offer in found.offers]
    assert sorted(map(str, names)) == sorted(f"c{n}" for n in range(items))
    asked = [int(query["page"]) for _, _, query, _ in clouds["prime"].requests]
    assert sorted(asked) == list(range(1, max(2, -(-items // 100)) + 1))
    assert most == max(2, -(-items // 100) - 2)


def test_prime_that_has_no_end(clouds: Clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a count of offers that cannot be is an error, and neither read for hours nor cut in silence. Red without
    the limit: it went on asking."""
    answer = {"items": ITEMS[:1], "totalCount": 200_000}
    monkeypatch.setattr(type(clouds["prime"]), "on_offers", lambda *_: Answer(200, answer))
    problem = anyio.run(find_offers, MachineNeeds(), ["prime"]).problems["prime"]
    assert problem.kind == "unreadable" and "totalCount 200000" in problem.text()
    assert clouds["prime"].calls("GET", "/availability") == 2 < PAGES_MAX


def test_a_page_of_prime_that_fails(clouds: Clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: where one page cannot be read, that is the provider's problem as before, not a group of errors. Red with
    the task group's own error let through."""
    clouds["prime"].key_works = False
    problem = anyio.run(find_offers, MachineNeeds(), ["prime"]).problems["prime"]
    assert isinstance(problem, CloudError) and problem.kind == "key"


PROGRAM = """
import sys
from rollouts.cloud.quick_httpx import import_httpx
import_httpx()
print(sorted({"trio", "httpx._main", "pygments"} & set(sys.modules)))
import trio
import httpx._main
"""


def test_httpx_without_what_is_not_used() -> None:
    """Goal: the command's import of httpx takes neither trio nor httpx's own command line with it, and hides neither
    from whoever imports it later. Red with a plain import."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout == "[]\n", done.stdout + done.stderr
