"""Run the state machine of a rented account against each stand-in: more examples than the tests have time for.

    python -m scripts.cloud_states [--examples 500] [--steps 20] [--provider vast]

Each example makes, loses, ends and looks for machines in a random order, with the process dying at random effects, and
ends in an error where the ledger and the provider disagree, or a machine is left billing.
"""

import argparse
import sys
import time

from hypothesis import HealthCheck, Verbosity, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.cloud.account_states import ACCOUNTS


def main() -> int:
    """Read the command line, run, and print how long each took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=500, help="of each provider")
    parser.add_argument("--steps", type=int, default=20, help="of an example, at most")
    parser.add_argument("--provider", choices=[account.provider for account in ACCOUNTS])
    options = parser.parse_args()
    wanted = settings(
        max_examples=options.examples,
        stateful_step_count=options.steps,
        deadline=None,
        database=None,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    for account in ACCOUNTS:
        if options.provider in (None, account.provider):
            began = time.monotonic()
            run_state_machine_as_test(account, settings=wanted)
            took_s = time.monotonic() - began
            print(f"{account.provider}: {options.examples} examples in {took_s:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
