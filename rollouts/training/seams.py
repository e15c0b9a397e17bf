"""What the parts of a run ask of each other: the tokenizer here; backends and engines in protocols of their own."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What rendering, sampling and checkpoints ask of a tokenizer. Those of transformers meet it."""

    name_or_path: str
    is_fast: bool  # whether it tells where in the text each token stands
    eos_token_id: int | None
    pad_token_id: int | None
    all_special_ids: list[int]
    added_tokens_decoder: Mapping[int, Any]
    special_tokens_map: Mapping[str, Any]

    def __call__(self, text: str | list[str], **options: Any) -> Mapping[str, Any]:
        """ "input_ids" of a text, or of each; with return_offsets_mapping "offset_mapping" too."""

    def decode(self, token_ids: Sequence[int], **options: Any) -> str: ...

    def batch_decode(self, sequences: Sequence[Sequence[int]], **options: Any) -> list[str]: ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """A conversation as text, or as ids with tokenize=True."""

    def get_chat_template(self, *, tools: Any = None) -> str: ...

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]: ...

    def save_pretrained(self, save_directory: Any) -> Any: ...
