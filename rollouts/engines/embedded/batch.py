"""The running batch: rows join, take one step together, and leave. Model thread alone.

B running rows, R rows of the forward pass (B, padded), K cache columns, V vocabulary. A joining row's prompt but for
its last token is prefilled (once for all rows that share it). That last token is the row's first step, so every sampled
token is an output of the same one-token forward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from rollouts.engines.embedded.cache import Prefilled, RowCache
from rollouts.engines.embedded.generate_request import PromptRequest, RowResult
from rollouts.engines.embedded.row_table import RowTable
from rollouts.engines.embedded.sampling import RowFilters, RowSampling, sample, uniforms
from rollouts.engines.embedded.served_model import Served

PREFILL_TOKENS_MAX = 16384  # padded tokens of one prefill forward pass: bounds its memory
# CPU matrix products take other kernels, with other rounding, for few rows; and attention for other widths. Padding
# both keeps a row's numbers the same whatever runs beside it, so a seed gives the same tokens:
# docs/design/embedded-engine.md.
CPU_ROWS_MIN = 16
WIDTH_STEP = 32

# as the answer's JSON has it: {"type": "stop" | "length" | "abort", ...}
FinishReason = dict[str, Any]


@dataclass(eq=False)
class PromptJob:
    """One prompt and the rows that were asked for. `done` is called once, with all rows finished."""

    request: PromptRequest
    done: Callable[[list[RowResult]], object]
    results: list[RowResult | None]
    input_logprobs: list[list[Any]] = field(default_factory=list)


@dataclass(eq=False)
class BatchRow:
    """One sequence of a job. The lists are brought up to date when the row leaves the batch."""

    job: PromptJob
    index: int  # in the n-fold group
    key: np.uint64  # its stream of uniforms
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[str, int]] = field(default_factory=list)
    cached_tokens: int = 0

    @property
    def ids(self) -> list[int]:
        return [*self.job.request.input_ids, *self.output_ids]


@dataclass(frozen=True)
class _Composition:
    """What depends on which rows run."""

    sampling: RowSampling
    watched: list[int]  # rows with stops other than EOS: their newest token is looked at
    columns_later: int  # of the longest row once it has all its tokens


class RunningBatch:
    """At most `rows_max` sequences decoded together."""

    def __init__(self, served: Served, rows_max: int) -> None:
        self.served = served
        self.rows: list[BatchRow] = []
        self.rows_max = rows_max
        self.prefilled_tokens = 0
        # Sampling needs float64; MPS has none.
        self._sampler = torch.device("cpu") if served.device.type == "mps" else served.device
        self._rows_min = CPU_ROWS_MIN if served.device.type == "cpu" else 1
        self._table = RowTable(max(rows_max, CPU_ROWS_MIN))
        self._is_eos_V = np.zeros(served.vocab_size, dtype=bool)
        self._is_eos_V[[token for token in served.eos_ids if token < served.vocab_size]] = True
        self._composition = self._compose()
        self._cache = RowCache(self._prefill([[0, 0]]), served.device)

    @property
    def free(self) -> int:
        return self.rows_max - len(self.rows)

    # --- joining ---

    def join(self, rows: Sequence[BatchRow], version: str) -> None:
        """Prefill the rows' tokens, each distinct sequence once, and start them."""
        assert len(rows) <= self.free
        start = len(self.rows)
        by_prefix: dict[tuple[int, ...], list[int]] = {}
        for offset, row in enumerate(rows):
            self._start_row(start + offset, row, version)
            prefix = tuple(row.ids[:-1])
            sharing = by_prefix.setdefault(prefix, [])
            if sharing and not row.output_ids:
                row.cached_tokens = len(prefix)
            sharing.append(start + offset)
        self.rows.extend(rows)
        self._composition = self._compose()
        self._reserve_columns(1)
        by_prefix.pop((), None)  # a prompt of one token has nothing to prefill
        for chunk in _chunks(sorted(by_prefix, key=len)):
            prefilled = self._prefill(chunk)
            columns = len(chunk[-1])
            self._reserve_columns(columns)
            sources = [source for source, prefix in enumerate(chunk) for _ in by_prefix[prefix]]
            targets = [target for prefix in chunk for target in by_prefix[prefix]]
            self._cache.place(prefilled, sources, targets, columns)

    def _start_row(self, at: int, row: BatchRow, version: str) -> None:
        request, ids, made = row.job.request, row.ids, len(row.output_ids)
        if not row.versions or row.versions[-1][0] != version:
            row.versions.append((version, made))
        params, eos = request.params, self.served.eos_ids
        own_stops = params.stop_token_ids - (frozenset() if params.ignore_eos else eos)
        line = (
            *(row.key, len(ids) - 1, ids[-1], made, request.max_new_tokens),
            params.scale,
            self.served.vocab_size if params.top_k == -1 else params.top_k,
            *(params.top_p, params.min_p, params.greedy),
            not params.greedy and (params.top_k != -1 or params.top_p < 1 or params.min_p > 0),
            params.ignore_eos,
            bool(params.stop or own_stops),
        )
        self._table.start(at, line, row.output_ids, row.logprobs)

    @torch.inference_mode()
    def _prefill(self, prefixes: Sequence[Sequence[int]]) -> Prefilled:
        """Return keys and values of right-padded prefixes; every layer keeps all columns, sliding or not."""
        lengths = [len(prefix) for prefix in prefixes]
        width = -(-max(lengths) // WIDTH_STEP) * WIDTH_STEP
        ids = np.zeros((len(prefixes), width), dtype=np.int64)
        seen = np.zeros((len(prefixes), width), dtype=np.int64)
        for index, prefix in enumerate(prefixes):
            ids[index, : len(prefix)], seen[index, : len(prefix)] = prefix, 1
        positions = np.minimum(np.arange(width), self.served.context_length - 1)
        cache = DynamicCache()
        self.served.model(
            input_ids=self._tensor(ids),
            attention_mask=self._tensor(seen),
            position_ids=self._tensor(positions)[None, :],
            use_cache=True,
            logits_to_keep=1,
            **{self.served.cache_argument: cache},
        )
        self.prefilled_tokens += sum(lengths)
        return [(keys, values) for keys, values, *_ in cache]

    # --- stepping ---

    @torch.inference_mode()
    def step(self) -> list[tuple[BatchRow, FinishReason]]:
        """Sample one token for every row. Rows that ended have left; they are returned with their finish reason."""
        count, now = len(self.rows), self._composition
        lines = self._table.lines[:count]
        logits_BV = self._forward(count)
        draws = torch.from_numpy(uniforms(lines["key"], lines["made"])).to(self._sampler)
        tokens, logprobs = sample(logits_BV.to(self._sampler), draws, now.sampling)
        tokens_B, logprobs_B = tokens.cpu().numpy(), logprobs.cpu().numpy()
        self._table.record(tokens_B, logprobs_B)

        ended_B = lines["made"] >= lines["made_max"]
        ended_B |= self._is_eos_V[tokens_B] & ~lines["ignore_eos"]
        ended_B |= ~np.isfinite(logprobs_B)
        watched = {
            at: reason
            for at in now.watched
            if (reason := self._own_stop(at, int(tokens_B[at]))) is not None
        }
        ended = sorted({*np.flatnonzero(ended_B).tolist(), *watched})
        if not ended:
            return []
        reasons = [
            self._reason(at, int(tokens_B[at]), float(logprobs_B[at]), watched.get(at))
            for at in ended
        ]
        return list(zip(self.leave(ended), reasons, strict=True))

    def _forward(self, count: int) -> torch.Tensor:
        """Return logits [B, V] of each row's next input token."""
        padded = max(count, self._rows_min)
        lines = self._table.lines[:padded]
        width = -(-(int(lines["length"].max()) + 1) // WIDTH_STEP) * WIDTH_STEP
        self._reserve_columns(width)
        lengths_R = self._tensor(lines["length"])
        self._cache.seek(lengths_R, width)
        tokens_R, masks = self._tensor(lines["token"]), self.served.decode_mask(lengths_R, width)
        if self.served.fast_decode is not None:
            return self.served.fast_decode(tokens_R, lengths_R, masks, self._cache)[:count]
        output = self.served.model(
            input_ids=tokens_R[:, None],
            attention_mask=masks,
            position_ids=lengths_R[:, None],
            use_cache=True,
            **{self.served.cache_argument: self._cache.cache},
        )
        return output.logits[:count, -1]

    def _own_stop(self, at: int, token: int) -> FinishReason | None:
        """Return the finish reason of a row with its own stops if its newest token completed one."""
        params = self.rows[at].job.request.params
        if token in params.stop_token_ids:
            return {"type": "stop", "matched": token}
        if not params.stop:
            return None
        # Every token is at least one byte of text, so the stop string that this token ended is within this tail.
        longest = max(len(stop.encode()) for stop in params.stop)
        tail = self.served.decode(self._table.newest(at, longest + 1), False)
        return next(
            ({"type": "stop", "matched": stop} for stop in params.stop if stop in tail), None
        )

    def _reason(
        self, at: int, token: int, logprob: float, own_stop: FinishReason | None
    ) -> FinishReason:
        if not np.isfinite(logprob):
            return abort_reason(
                "the model's logits are not finite: the served weights are broken", 500
            )
        if own_stop is not None:
            return own_stop
        line = self._table.lines[at]
        if self._is_eos_V[token] and not line["ignore_eos"]:  # at the last place too, as in SGLang
            return {"type": "stop", "matched": token}
        return {"type": "length", "length": int(line["made_max"])}

    # --- leaving ---

    def leave(self, indices: Sequence[int]) -> list[BatchRow]:
        """Take these rows (ascending indices) out, their outputs written back, and close the gaps they leave."""
        left = [self.rows[at] for at in indices]
        for at, row in zip(indices, left, strict=True):
            row.output_ids, row.logprobs = self._table.outputs(at)
        gone, count = set(indices), len(self.rows) - len(indices)
        holes = [at for at in indices if at < count]
        movers = [at for at in range(count, len(self.rows)) if at not in gone]
        if movers:
            self._cache.move(movers, holes, int(self._table.lines["length"][movers].max()))
            self._table.move(movers, holes)
            for hole, mover in zip(holes, movers, strict=True):
                self.rows[hole] = self.rows[mover]
        del self.rows[count:]
        self._table.clear_from(count)
        self._composition = self._compose()
        return left

    def flush(self) -> bool:
        """Free the cache's memory unless rows are in it. Return whether it is free."""
        if self.rows:
            return False
        self._cache.drop()
        return True

    def note_version(self, version: str) -> None:
        """Note that running rows are sampled with these weights from here on."""
        for at, row in enumerate(self.rows):
            if row.versions[-1][0] != version:
                row.versions.append((version, int(self._table.lines["made"][at])))

    # --- upkeep ---

    def _compose(self) -> _Composition:
        lines = self._table.lines[: len(self.rows)]
        later = int((lines["length"] + lines["made_max"] - lines["made"]).max(initial=0))
        return _Composition(
            self._sampling_of(lines), np.flatnonzero(lines["watched"]).tolist(), later
        )

    def _sampling_of(self, lines: np.ndarray) -> RowSampling:
        def column(name: str) -> torch.Tensor:
            return torch.from_numpy(lines[name].copy()).to(self._sampler)

        filters = None
        if lines["filtered"].any():
            filters = RowFilters(
                column("top_k")[:, None], column("top_p")[:, None], column("min_p")[:, None]
            )
        return RowSampling(
            temperature_B1=column("temperature")[:, None]
            if (lines["temperature"] != 1).any()
            else None,
            greedy_B=column("greedy") if lines["greedy"].any() else None,
            filters=filters,
        )

    def _reserve_columns(self, columns: int) -> None:
        self._cache.reserve(
            max(len(self.rows), self._rows_min), columns, self._composition.columns_later
        )

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.served.device, non_blocking=True)


def abort_reason(message: str, status_code: int | None = None) -> FinishReason:
    """Return the finish reason of an aborted row; with a status code, of one that failed here."""
    err_type = None if status_code is None else "InternalServerError"
    return {"type": "abort", "message": message, "status_code": status_code, "err_type": err_type}


def _chunks(prefixes: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Split prefixes, shortest first, so that none of the padded prefills exceeds PREFILL_TOKENS_MAX (or holds one)."""
    chunks: list[list[tuple[int, ...]]] = []
    for prefix in prefixes:
        if chunks and len(prefix) * (len(chunks[-1]) + 1) <= PREFILL_TOKENS_MAX:
            chunks[-1].append(prefix)
        else:
            chunks.append([prefix])
    return chunks
