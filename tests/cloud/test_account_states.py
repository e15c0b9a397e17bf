"""The state machine of an account, for a bounded time and the same every time; scripts/cloud_states goes on longer."""

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.cloud.account_states import ACCOUNTS, Account

FEW = settings(max_examples=12, stateful_step_count=10, derandomize=True, deadline=None)


@pytest.mark.parametrize("account", ACCOUNTS)
def test_the_ledger_and_the_provider_agree(account: type[Account]) -> None:
    """Goal: whatever happens, in any order and with the process dying at any effect, after a look the ledger holds open
    what bills, each machine was made once, another computer's is told and left alone, and all of ours can be ended."""
    run_state_machine_as_test(account, settings=FEW)
