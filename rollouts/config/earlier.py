"""Fields that the schema did not always have, for a config.json that an earlier run wrote."""

import logging
from typing import Any

logger = logging.getLogger(__name__)
_said: set[str] = set()  # sections whose additions this process has named


def with_added_fields(data: Any, path: str) -> Any:
    """Return the JSON `data` of a config with the fields that it was written before, as that run behaved.

    A section that lacks only some of the fields added to it was not written by an earlier version, and stays as it is.
    What is added is said in a warning, once.
    """
    if not isinstance(data, dict) or not isinstance(data.get("eval"), dict):
        return data
    added = _answers(data)
    if any(key in data["eval"] for key in added):
        return data
    if "eval" not in _said:
        _said.add("eval")
        shown = ", ".join(f"eval.{key}={value}" for key, value in added.items())
        logger.warning("%s was written before these fields were added; its run had: %s", path, shown)
    return {**data, "eval": {**data["eval"], **added}}


def _answers(data: dict[str, Any]) -> dict[str, int]:
    """Answers in process had no limit: all rows, as long as RL's, or else as data.max_length."""
    rl, of_data = data.get("rl"), data.get("data")
    length = of_data.get("max_length") if isinstance(of_data, dict) else None
    longest = rl.get("max_new_tokens") if isinstance(rl, dict) else length
    return {"in_process_rows": -1, "in_process_new_tokens": longest, "in_process_batch_tokens": 2**17}  # type: ignore[dict-item]
