"""The verbs about rented machines: `deploy offers`. What they need of rollouts.cloud is imported when they run."""

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rollouts.remote.errors import DeployError
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.view.answer import Answer

if TYPE_CHECKING:
    from rollouts.cloud.machine_types import MachineNeeds


@contextlib.contextmanager
def cloud_verb() -> Iterator[None]:
    """Run a verb that talks to providers. Raises DeployError where what it needs is not installed."""
    with as_deploy_errors():
        try:
            import httpx  # noqa: F401
        except ImportError:
            raise DeployError(
                "rented machines need the package httpx, which is not installed here.",
                fix="pip install 'rollouts[cloud]'",
            ) from None
        yield


def offers(wanted: "MachineNeeds") -> Answer:
    """List what every provider with a key here would rent out (`deploy offers`). Exit code 2: nothing fits."""
    with cloud_verb():
        import anyio

        from rollouts.cloud.accounts import find_offers, no_key
        from rollouts.cloud.offer_table import offer_json, offers_text

        asked = anyio.run(functools.partial(find_offers, wanted))
        if not asked.offers and not asked.problems:
            raise no_key(asked.without_key)
        problems = {name: error.to_json()["problems"][0] for name, error in asked.problems.items()}
        document = {
            "offers": [offer_json(offer) for offer in asked.offers],
            "problems": problems,
            "without_key": asked.without_key,
        }
        notes = [f"error: {error.problems[0].text()}" for error in asked.problems.values()]
        notes += [f"note: no key of {name} here" for name in asked.without_key]
        fits = any(not offer.left_out for offer in asked.offers)
        return Answer(document, offers_text(asked.offers), exit_code=0 if fits else 2, remarks=tuple(notes))
