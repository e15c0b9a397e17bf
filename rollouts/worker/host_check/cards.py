"""What nvidia-smi tells of the cards' health, and of the ways between them."""

import re
import shutil
import subprocess
from typing import Any

TIMEOUT_S = 15  # for each question: it hangs where the driver waits for a broken card
FIELDS = (
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "ecc.mode.current",
    "ecc.errors.corrected.volatile.total",
    "ecc.errors.uncorrected.volatile.total",
    "temperature.gpu",
    "clocks_throttle_reasons.hw_slowdown",
)
ROWS = ("remapped_rows.pending", "remapped_rows.failure")


def cards_row() -> dict[str, Any]:
    """Return {index: {field: word}} of the cards, as nvidia-smi writes them, and its table of the ways between."""
    if shutil.which("nvidia-smi") is None:
        return {"cards": {}, "topology": ""}
    cards: dict[str, dict[str, str]] = {}
    for option, key, fields in (
        ("--query-gpu", "index", FIELDS),
        ("--query-remapped-rows", "gpu_uuid", ROWS),
    ):
        for identity, values in _ask(option, key, fields).items():
            cards.setdefault(_index_of(identity, cards), {}).update(values)
    return {"cards": cards, "topology": _plain(_smi("topo", "-m"))}


def _ask(option: str, key: str, fields: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Ask for `fields`, without those that this nvidia-smi does not know: it refuses the whole query over one."""
    key_fields = (key,) if key != "index" else ("index", "uuid")
    text = _smi(f"{option}={','.join((*key_fields, *fields))}", "--format=csv,noheader,nounits")
    if "not a valid field" in text:
        fields = tuple(
            field for field in fields if "not a valid field" not in _smi_one(option, key, field)
        )
        text = _smi(f"{option}={','.join((*key_fields, *fields))}", "--format=csv,noheader,nounits")
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(key_fields) + len(fields):
            identity = cells[0]
            names = (*key_fields[1:], *fields)
            found[identity] = dict(zip(names, cells[1:], strict=True))
    return found


def _smi_one(option: str, key: str, field: str) -> str:
    return _smi(f"{option}={key},{field}", "--format=csv,noheader,nounits")


def _index_of(identity: str, cards: dict[str, dict[str, str]]) -> str:
    """Return a card's index, where it is named by its UUID."""
    return next(
        (index for index, values in cards.items() if values.get("uuid") == identity), identity
    )


def _smi(*arguments: str) -> str:
    """Return what nvidia-smi prints; "" where it does not answer."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def _plain(text: str) -> str:
    """Return text without the codes that underline its header on a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
