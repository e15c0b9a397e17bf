"""The tokens that end an assistant's turn: the same for masks, stop tokens, evaluation, agents and checkpoints.

Three places name such tokens, and models disagree on which of them is right: the tokenizer's eos_token (of a base model
the end of a document), the generation config (a list in Llama 3, Gemma and Phi-3), and the chat template, whose end SFT
trains. All of them count. Effects: config files beside the tokenizer are read.
"""

import json
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rollouts.data_formats.row import DataError
from rollouts.training.datasets.chat_template import ChatTemplate
from rollouts.training.seams import Tokenizer

if TYPE_CHECKING:
    from torch import nn
    from transformers import GenerationConfig

_WORD, _NAME = "Zqxjword", "zqxj_tool"  # in no template
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": _WORD,
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "string", "description": _WORD}},
        },
    },
}
_SYSTEM = {"role": "system", "content": "Be brief."}  # some templates insist
_ASKED = {"role": "user", "content": "Say it."}
_SAID = {"role": "assistant", "content": _WORD}
_CALL = {
    "id": "call00000",
    "type": "function",
    "function": {"name": _NAME, "arguments": {"x": "1"}},
}
_CALLED = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_CONFIG_FILES = ("generation_config.json", "config.json")


def end_of_turn_ids(tokenizer: Tokenizer, model: "nn.Module | None" = None) -> list[int]:
    """Return every token that ends an assistant's turn: the tokenizer's eos_token first, then the others by id.

    They are named by the tokenizer, by the chat template (after text, and after a tool call if that differs), and by
    the configs: `model`'s, or without one those beside the tokenizer. The list may be empty.
    """
    named = (
        _of_model(model) if model is not None else _saved_beside(str(tokenizer.name_or_path or ""))
    )
    found = {*named, *_ids(tokenizer.eos_token_id)}
    found |= template_end_ids(tokenizer, frozenset(found))
    first = _ids(tokenizer.eos_token_id)
    return [*first, *sorted(found - set(first))]


@dataclass(frozen=True)
class TurnEnds:
    """Finds where turns end in token ids."""

    tokenizer: Tokenizer
    ids: frozenset[int]  # the tokens that end a turn
    specials: frozenset[int]  # those, and all special tokens

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> "TurnEnds":
        ids = frozenset(end_of_turn_ids(tokenizer))
        return cls(tokenizer, ids, ids | _special_ids(tokenizer))

    def after_turn(self, ids: Sequence[int], start: int, stop: int) -> int | None:
        """Return where the turn with tokens ids[start:stop] ends: after the first token at its end that ends turns.

        A template may write more there, which is never sampled: white space, or a second special token (Phi-3's ends
        the whole conversation). If no token there ends turns, it is after the last special one. Return None if text
        follows that, or if there is none.
        """
        last = next((end for end in range(stop, start, -1) if ids[end - 1] in self.specials), None)
        if last is None or self._is_text(ids[last:stop]):
            return None
        first = last
        while first > start and (
            ids[first - 1] in self.specials or not self._is_text(ids[first - 1 : first])
        ):
            first -= 1
        return next((at + 1 for at in range(first, last) if ids[at] in self.ids), last)

    def _is_text(self, ids: Sequence[int]) -> bool:
        """Return whether the tokens are more than white space. Half a character decodes to a mark: text."""
        return bool(self.tokenizer.decode(list(ids)).strip())


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the special ids. "</tool_call>" is an added token too, but not special: no turn ends there."""
    added = tokenizer.added_tokens_decoder
    return frozenset(
        {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    )


def template_end_ids(tokenizer: Tokenizer, named: Set[int] = frozenset()) -> set[int]:
    """Return the tokens that the chat template writes after an answer and after a tool call; it may write none.

    `named`: tokens that end turns by other sources, special or not.
    """
    specials = _special_ids(tokenizer) | named
    found: set[int] = set()
    said = _rendered(tokenizer, [_ASKED, _SAID], None) or _rendered(
        tokenizer, [_SYSTEM, _ASKED, _SAID], None
    )
    if said is not None and _WORD in said:
        following = tokenizer(said.rpartition(_WORD)[2], add_special_tokens=False)["input_ids"]
        found.update([token for token in following if token in specials][:1])
    called = _rendered(tokenizer, [_ASKED, _CALLED], [_TOOL]) or _rendered(
        tokenizer, [_SYSTEM, _ASKED, _CALLED], [_TOOL]
    )
    if called is not None and called.count(_NAME) > 1:  # in the list of tools, and in the call
        ids = tokenizer(called, add_special_tokens=False)["input_ids"]
        end = TurnEnds(tokenizer, frozenset(named | found), specials).after_turn(ids, 0, len(ids))
        found.update(ids[end - 1 : end] if end else ())
    return found


def _rendered(tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: Any) -> str | None:
    """Return the template's text of a conversation; None without a template, or where it refuses the messages."""
    try:
        return ChatTemplate(tokenizer, tools, "").render([messages])[0].text
    except DataError:
        return None


def _of_model(model: "nn.Module") -> set[int]:
    """Return the ids in the configs of a model in memory. `evaluating` sets its generation config aside meanwhile."""
    generation = own_generation_config(model)
    config = cast(Any, model.config)
    configs = [config, config.get_text_config(), generation]
    return {token for config in configs for token in _ids(getattr(config, "eos_token_id", None))}


def own_generation_config(model: "nn.Module") -> "GenerationConfig | None":
    """Return the model's generation config, also while an evaluation has put another in its place; None without."""
    aside = getattr(model, "_own_generation_config", None)
    return getattr(model, "generation_config", None) if aside is None else aside


def _saved_beside(name: str) -> set[int]:
    """Return the ids in the config files of a model directory, or of a hub model that was fetched before."""
    from transformers.utils import cached_file

    found: set[int] = set()
    for file in _CONFIG_FILES if name else ():
        try:
            path = cached_file(
                name,
                file,
                local_files_only=True,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
            config = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # neither a directory nor a hub id, or not JSON: loading the model reports it
            continue
        nested = config.get("text_config")
        for one in (config, nested if isinstance(nested, dict) else {}):
            found |= {*_ids(one.get("eos_token_id"))}
    return found


def _ids(value: Any) -> list[int]:
    """Return an eos_token_id of any config as a list: it is None, one id, or several."""
    several: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
    return [int(token) for token in several if token is not None]
