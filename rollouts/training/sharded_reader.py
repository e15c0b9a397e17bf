"""Read the index of a `torch.distributed.checkpoint` directory without running what it says.

The index, `.metadata`, is a pickle, and torch unpickles it as it comes: a directory of somebody else's could run any
code. Here nothing but that format's own data classes is admitted, and the parts of it that are followed are checked.
"""

import enum
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

INDEX_FILE = ".metadata"
_FORMAT = "torch.distributed.checkpoint"
_ADMITTED = {
    *(
        (f"{_FORMAT}.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    (f"{_FORMAT}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # a layout by its name
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath")),
    *(("pathlib._local", name) for name in ("Path", "PosixPath", "PurePosixPath")),  # Python 3.13
}


class UnsafeIndexError(Exception):
    """An index that is damaged, or holds what no checkpoint needs. The message says what."""


class SafeReader(FileSystemReader):
    """torch's reader, with an index that is read once, safely, and names files of its own directory alone."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Raises UnsafeIndexError."""
        metadata = read_index(Path(self.path))
        metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_index(directory: Path) -> Metadata:
    """Return the index of `directory`. Raises UnsafeIndexError for one that is no index of tensors in files
    beside it."""
    try:
        with (directory / INDEX_FILE).open("rb") as file:
            metadata = _Unpickler(file).load()
    except UnsafeIndexError as error:
        raise UnsafeIndexError(f"{directory / INDEX_FILE}: {error}") from None
    except Exception as error:  # a broken pickle may raise anything at all
        raise UnsafeIndexError(
            f"{directory / INDEX_FILE}: cannot be read: {type(error).__name__}: {error}"
        ) from error
    problem = _problem(metadata)
    if problem:
        raise UnsafeIndexError(f"{directory / INDEX_FILE}: {problem}")
    return metadata


def _problem(metadata: Any) -> str | None:
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        return f"is {type(metadata).__name__}, needs the index of a checkpoint"
    for name, item in metadata.state_dict_metadata.items():
        if not isinstance(item, TensorStorageMetadata):
            return f"{name} is {type(item).__name__}, needs a tensor: was it edited?"
    for stored in (metadata.storage_data or {}).values():
        file = getattr(stored, "relative_path", None)
        if not isinstance(file, str) or PurePath(file).name != file:
            return f"names the file {file!r}, needs one in its own directory"
    return None


def _enum_member(owner: Any, name: Any) -> enum.Enum:
    """Return the member `name` of an enumeration: Python 3.11.0 to 3.11.3 write one as getattr(class, name)."""
    if not (
        isinstance(owner, enum.EnumMeta) and isinstance(name, str) and name in owner.__members__
    ):
        raise UnsafeIndexError(
            f"asks for getattr({owner!r}, {name!r}), which is no part of a checkpoint: it is not run"
        )
    return owner.__members__[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        is_dtype = (
            module == "torch"
            and "." not in name
            and isinstance(getattr(torch, name, None), torch.dtype)
        )
        if not is_dtype and (module, name) not in _ADMITTED:
            raise UnsafeIndexError(
                f"asks for {module}.{name}, which is no part of a checkpoint: it is not run"
            )
        return super().find_class(module, name)
