"""The key/value cache of a running batch: one row per sequence, each from column 0, all in one tensor per layer.

R rows, H key/value heads, K columns, D head size, G prompts of a prefill. A row's new token is written at that row's
own length, so rows of different lengths decode together, none is ever shifted, and a row's numbers do not depend on
how long its neighbours are. Columns beyond a row's length are stale and masked out by `Served.decode_mask`.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

COLUMNS_STEP = 32  # columns are allocated in multiples of this
COLUMNS_AHEAD_MAX = 1024  # at most so many columns more than are needed now

Prefilled = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values [G, H, K, D] of each layer


class _Cursor:
    """Where the running forward pass writes, shared by all layers: set once per step."""

    def __init__(self) -> None:
        self.rows = 0
        self.width = 0
        # by head count H: where each row's new token goes, [R * H]
        self.places_N: dict[int, torch.Tensor] = {}


class RowLayer(CacheLayerMixin):
    """One layer: keys and values [R, H, K, D], written in place."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, cursor: _Cursor, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.cursor = cursor
        self.lazy_initialization(keys, values)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take head count, head sizes, dtype and device from states of this layer; without rows and columns."""
        self.keys = key_states.new_zeros((0, key_states.shape[1], 0, key_states.shape[3]))
        self.values = value_states.new_zeros((0, value_states.shape[1], 0, value_states.shape[3]))
        self.is_initialized = True

    def reserve(self, rows: int, columns: int) -> None:
        """Grow to at least this many rows and columns; the contents stay."""
        self.keys, self.values = (
            _grown(self.keys, rows, columns),
            _grown(self.values, rows, columns),
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one new token per row [R, H, 1, D] at its length; return the rows' columns up to the step's width."""
        at = self.cursor
        for cached, new in ((self.keys, key_states), (self.values, value_states)):
            cached.view(-1, cached.shape[3]).index_copy_(
                0, at.places_N[new.shape[1]], new.reshape(-1, cached.shape[3])
            )
        return self.keys[: at.rows, :, : at.width], self.values[: at.rows, :, : at.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cursor.width, 0

    def get_seq_length(self) -> int:
        return self.cursor.width - 1

    def get_max_length(self) -> int:
        return -1


class RowCache:
    """All layers of a batch. The caller decides which request has which row."""

    def __init__(self, prefilled: Prefilled, device: torch.device) -> None:
        """Make an empty cache, shaped like the layers of any prefill of the same model."""
        self._cursor = _Cursor()
        self._device = device
        self._rows, self._columns = 0, 0
        self.layers = [RowLayer(self._cursor, keys, values) for keys, values in prefilled]
        self._cursor.places_N = {keys.shape[1]: torch.empty(0) for keys, _ in prefilled}
        self.cache = Cache(layers=list(self.layers))

    def reserve(self, rows: int, columns: int, columns_later: int) -> None:
        """Make room for rows that need `columns` now and may need `columns_later`; growing copies all."""
        if rows <= self._rows and columns <= self._columns:
            return
        if columns > self._columns:
            columns = max(columns, min(columns_later, columns + COLUMNS_AHEAD_MAX))
            self._columns = -(-columns // COLUMNS_STEP) * COLUMNS_STEP
        self._rows = max(rows, self._rows)
        for layer in self.layers:
            layer.reserve(self._rows, self._columns)

    def place(
        self, prefilled: Prefilled, sources: list[int], rows: list[int], columns: int
    ) -> None:
        """Copy the first `columns` of prefilled rows `sources` to `rows`; one source may fill many rows."""
        sources_R = torch.tensor(sources, device=self._device)
        rows_R = torch.tensor(rows, device=self._device)
        for layer, (keys, values) in zip(self.layers, prefilled, strict=True):
            layer.keys[rows_R, :, :columns] = keys[sources_R, :, :columns]
            layer.values[rows_R, :, :columns] = values[sources_R, :, :columns]

    def move(self, sources: list[int], rows: list[int], columns: int) -> None:
        """Copy the first `columns` of rows `sources` over `rows` (disjoint)."""
        sources_R = torch.tensor(sources, device=self._device)
        rows_R = torch.tensor(rows, device=self._device)
        for layer in self.layers:
            layer.keys[rows_R, :, :columns] = layer.keys[sources_R, :, :columns]
            layer.values[rows_R, :, :columns] = layer.values[sources_R, :, :columns]

    def seek(self, lengths_R: torch.Tensor, width: int) -> None:
        """Point the next forward pass at rows 0 to R-1, each at its length, attending to `width` columns."""
        self._cursor.rows, self._cursor.width = lengths_R.shape[0], width
        for heads in self._cursor.places_N:
            lines_RH = torch.arange(lengths_R.shape[0] * heads, device=self._device).view(-1, heads)
            self._cursor.places_N[heads] = (lines_RH * self._columns + lengths_R[:, None]).flatten()

    def drop(self) -> None:
        """Free the memory."""
        self._rows, self._columns = 0, 0
        for layer in self.layers:
            layer.lazy_initialization(layer.keys, layer.values)


def _grown(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    old_rows, heads, old_columns, size = tensor.shape
    if rows <= old_rows and columns <= old_columns:
        return tensor
    larger = tensor.new_zeros((max(rows, old_rows), heads, max(columns, old_columns), size))
    larger[:old_rows, :, :old_columns] = tensor
    return larger
