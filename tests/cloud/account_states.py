"""One account with one provider's stand-in, as a state machine: machines are made, lost, ended and looked for in any
order, and the process dies at any effect. After a look the ledger and the provider have to agree.

`scripts/cloud_states` runs it for as long as one likes.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from rollouts.cloud import AsyncGPUClient, CloudError
from rollouts.cloud.accounts import keys_here, open_providers
from rollouts.cloud.ledger import Ledger
from rollouts.cloud.machine_types import PROVIDERS, ProviderName
from rollouts.cloud.our_machines import OurMachines, look
from rollouts.cloud.provider_api import HttpReply, ProviderApi
from rollouts.cloud.renting import Patience, end
from tests.cloud.conftest import CLOUDS, variables

PATIENCE = Patience(settle_s=0.15, end_s=60.0, poll_s=0.01, ask_again_s=0.05)
PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKey"
CREATE_FAULTS = ("", "lost", "500 after", "page after", "408 after", "500", "lost before")
CREATE_FATES = ("", "capacity", "lag", "broken", "dearer")
END_FAULTS = ("", "does nothing", "500", "lost", "429 plain")
crashes = st.none() | st.integers(0, 14)


class Crash(BaseException):
    """The process dies here: nothing after it is done."""


class Process:
    """A process that dies before its next effect once it has had so many: lines of the ledger, and HTTP calls."""

    def __init__(self) -> None:
        self.left: int | None = None

    def step(self) -> None:
        if self.left is not None:
            if self.left <= 0:
                raise Crash
            self.left -= 1


class Account(RuleBasedStateMachine):
    """Subclasses name the provider."""

    provider: ProviderName

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.cloud = CLOUDS[self.provider]()
        self.stack.callback(self.cloud.stop)
        self.home = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.process = Process()
        self._patch(self.stack.enter_context(pytest.MonkeyPatch.context()))
        self.elsewhere: set[str] = set()  # names that another computer rented

    def _patch(self, patch: pytest.MonkeyPatch) -> None:
        for other in PROVIDERS:
            patch.delenv(f"{other.upper()}_API_KEY", raising=False)
        for variable, value in variables({self.provider: self.cloud}, self.home).items():
            patch.setenv(variable, value)
        patch.setattr("rollouts.cloud.provider_api.FIRST_WAIT_S", 0.005)
        patch.setattr("rollouts.cloud.lambda_labs.CALL_GAP_S", 0.0)
        patch.setattr("rollouts.cloud.lambda_labs.LAUNCH_GAP_S", 0.0)
        patch.setattr("tests.cloud.fakes.server.LAG_S", 0.05)
        append, once, process = Ledger._append, ProviderApi._once, self.process

        def dying_append(self: Ledger, *args: Any, **fields: Any) -> None:
            process.step()
            append(self, *args, **fields)
            process.step()

        async def dying_once(self: ProviderApi, *args: Any, **options: Any) -> HttpReply:
            process.step()
            reply = await once(self, *args, **options)
            process.step()
            return reply

        patch.setattr(Ledger, "_append", dying_append)
        patch.setattr(ProviderApi, "_once", dying_once)

    def _run(self, work: Callable[[], Awaitable[Any]], crash: int | None) -> Any:
        """Do it, dying after so many effects. Errors that were told are as good as done."""
        self.process.left = crash
        try:
            return anyio.run(work)
        except (CloudError, Crash):
            return None
        except BaseExceptionGroup as group:
            if group.split((CloudError, Crash))[1] is not None:
                raise
            return None
        finally:
            self.process.left = None
            self.cloud.faults.clear()

    async def _create(self) -> None:
        client = AsyncGPUClient(self.provider, patience=PATIENCE)
        offers = await client.search(client.gpu_type.contains("H100"))
        if offers:
            await client.create(offers[0], public_key=PUBLIC_KEY)

    @rule(fault=st.sampled_from(CREATE_FAULTS), fate=st.sampled_from(CREATE_FATES), crash=crashes)
    def create(self, fault: str, fate: str, crash: int | None) -> None:
        for kind in filter(None, (fault, fate)):
            self.cloud.fault("create", kind)
        self._run(self._create, crash)

    @rule(fault=st.sampled_from(CREATE_FAULTS))
    def create_elsewhere(self, fault: str) -> None:
        """Another computer with the same account rents one."""
        before = {machine.name for machine in self.cloud.machines.values()}
        if fault:
            self.cloud.fault("create", fault)
        own = os.environ["ROLLOUTS_HOME"]
        os.environ["ROLLOUTS_HOME"] = str(self.home / "another")
        try:
            self._run(self._create, None)
        finally:
            os.environ["ROLLOUTS_HOME"] = own
        self.elsewhere |= {machine.name for machine in self.cloud.machines.values()} - before

    @rule(fault=st.sampled_from(END_FAULTS), crash=crashes, which=st.integers(0, 3))
    def end(self, fault: str, crash: int | None, which: int) -> None:
        leases = [lease for lease in Ledger().open_leases() if lease.machine_id]
        if not leases:
            return
        if fault:
            self.cloud.fault("terminate", fault)
        lease = leases[which % len(leases)]

        async def ask() -> None:
            async with open_providers(keys_here([self.provider])[0]) as providers:
                await end(providers[self.provider], lease, Ledger(), PATIENCE, reason="test")

        self._run(ask, crash)

    @rule(which=st.integers(0, 3))
    def ended_on_the_web_page(self, which: int) -> None:
        billing = [machine for machine in self.cloud.machines.values() if machine.bills]
        if billing:
            self.cloud.end(billing[which % len(billing)])

    @rule()
    def look(self) -> None:
        self._agree()

    @rule(crash=st.integers(0, 6))
    def look_that_dies(self, crash: int) -> None:
        self._wait_for_lagging()
        self._run(lambda: look(Ledger(), young_s=0.0), crash)

    def _wait_for_lagging(self) -> None:
        while any(machine.is_hidden for machine in self.cloud.machines.values()):
            time.sleep(0.005)

    def _agree(self) -> None:
        """Look, and compare: what bills is open in the ledger or told as somebody else's; each name was made once."""
        self._wait_for_lagging()
        found: OurMachines = self._run(lambda: look(Ledger(), young_s=0.0), None)
        billing = set(self.cloud.bill())
        assert found.problems == {}
        assert {lease.name for lease in Ledger().open_leases()} == billing - self.elsewhere
        assert {machine.name for machine in found.unknown} == billing & self.elsewhere
        assert {row.name for row in found.rows} == billing
        assert all(
            len(self.cloud.named(machine.name)) == 1 for machine in self.cloud.machines.values()
        )

    def teardown(self) -> None:
        """After all of it, everything of ours can be ended, and nothing bills but what others rented."""
        self._agree()

        async def end_ours() -> None:
            async with open_providers(keys_here([self.provider])[0]) as providers:
                for lease in Ledger().open_leases():
                    await end(providers[self.provider], lease, Ledger(), PATIENCE, reason="test")

        self._run(end_ours, None)
        assert set(self.cloud.bill()) <= self.elsewhere and Ledger().open_leases() == []
        for machine in self.cloud.machines.values():
            self.cloud.end(machine)
        self.stack.close()


class RunPodAccount(Account):
    provider = "runpod"


class VastAccount(Account):
    provider = "vast"


class LambdaAccount(Account):
    provider = "lambda"


class PrimeAccount(Account):
    provider = "prime"


ACCOUNTS = (RunPodAccount, VastAccount, LambdaAccount, PrimeAccount)
