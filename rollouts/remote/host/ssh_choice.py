"""Which client logs in to a host: paramiko, or the OpenSSH command where paramiko cannot. Pure."""

from dataclasses import dataclass

from rollouts.remote.host.ssh_auth import LoginFailed
from rollouts.remote.host.ssh_config import Hop


@dataclass(frozen=True)
class LoginWay:
    """Take the ssh command. `asks`: it may ask its user on the terminal."""

    why: str
    asks: bool = False


def choose_client(hop: Hop, failure: LoginFailed, *, can_ask: bool) -> LoginWay | None:
    """Return how the ssh command may get in where paramiko's login at `hop` failed; None: it cannot either.

    `can_ask`: there is a terminal, or a program, that ssh can ask its user by. A password alone is never asked for.
    """
    if failure.second_factor:
        factors = ", ".join(failure.second_factor)
        return (
            LoginWay(f"{hop.login} wants {factors} beside the key", asks=True) if can_ask else None
        )
    rules = (
        (
            _offers(hop, failure, "gssapi-with-mic", "gssapiauthentication"),
            "takes a Kerberos ticket",
        ),
        (
            _offers(hop, failure, "hostbased", "hostbasedauthentication"),
            "trusts this machine (hostbased)",
        ),
        (
            hop.values.get("pkcs11provider", "none") not in ("", "none"),
            "takes a key on a smart card (PKCS11Provider)",
        ),
        (_skipped(failure, "security key"), "takes a security key"),
        (
            _skipped(failure, "-cert.pub", *map(str, hop.certificate_files)),
            "takes a certificate that paramiko cannot use",
        ),
        (can_ask and failure.locked, "takes a key with a passphrase, which no agent holds"),
        (
            can_ask and _only_questions(failure),
            "asks questions in place of a key (keyboard-interactive)",
        ),
    )
    why = next((words for holds, words in rules if holds), None)
    return None if why is None else LoginWay(f"{hop.login} {why}", asks=can_ask)


def _offers(hop: Hop, failure: LoginFailed, method: str, keyword: str) -> bool:
    return method in failure.allowed and hop.values.get(keyword) == "yes"


def _only_questions(failure: LoginFailed) -> bool:
    return "keyboard-interactive" in failure.allowed and "publickey" not in failure.allowed


def _skipped(failure: LoginFailed, *words: str) -> bool:
    return any(word in reason for reason in failure.skipped for word in words)
