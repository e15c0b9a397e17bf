"""The running batch: rows join, take one step together, and leave. Runs on the model thread alone.

B running rows, R rows of the forward pass (B, padded), K cache columns, V vocabulary. A joining row's prompt but for
its last token is prefilled (once for all rows that share it); that last token is the row's first step, so every sampled
token comes out of the same one-token forward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from rollouts.engines.embedded.cache import Prefilled, RowCache
from rollouts.engines.embedded.model import Served
from rollouts.engines.embedded.protocol import PromptRequest, RowResult
from rollouts.engines.embedded.sampling import sample, uniforms

PREFILL_TOKENS_MAX = 16384  # padded tokens of one prefill forward pass: bounds its memory
# CPU matrix products take other kernels, with other rounding, for few rows; and attention for other widths. Padding
# both keeps a row's numbers the same whoever runs beside it, so a seed gives the same tokens (docs/engines.md).
CPU_ROWS_MIN = 16
WIDTH_STEP = 32


_ROW = np.dtype(
    [
        ("key", np.uint64),  # its stream of uniforms
        ("length", np.int64),  # column (and position) of its next input token
        ("token", np.int64),  # that token
        ("made", np.int64),  # tokens sampled so far
        ("made_max", np.int64),
        ("temperature", np.float32),
        ("top_k", np.float32),  # the vocabulary's size: no limit
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("greedy", bool),
        ("filtered", bool),  # by top_k, top_p or min_p
        ("ignore_eos", bool),
        ("watched", bool),  # has stops that are not simply EOS
    ],
    align=True,
)


@dataclass(eq=False)
class Job:
    """One prompt and the rows it was asked for. `done` is called once, with all rows finished."""

    request: PromptRequest
    done: Callable[[list[RowResult]], object]
    results: list[RowResult | None]
    input_logprobs: list[list[Any]] = field(default_factory=list)


@dataclass(eq=False)
class Row:
    """One sequence of a job. The lists are brought up to date when the row leaves the batch."""

    job: Job
    index: int  # in the n-fold group
    key: np.uint64  # its stream of uniforms
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[str, int]] = field(default_factory=list)
    cached_tokens: int = 0

    @property
    def ids(self) -> list[int]:
        return [*self.job.request.input_ids, *self.output_ids]


class Batch:
    """At most `rows_max` sequences decoded together."""

    def __init__(self, served: Served, rows_max: int) -> None:
        self.served = served
        self.rows: list[Row] = []
        self.rows_max = rows_max
        self.prefilled_tokens = 0
        # Sampling needs float64, which MPS has not.
        self._sampler = torch.device("cpu") if served.device.type == "mps" else served.device
        capacity = max(rows_max, CPU_ROWS_MIN)
        self._rows_min = CPU_ROWS_MIN if served.device.type == "cpu" else 1
        self._state = np.zeros(capacity, dtype=_ROW)
        self._out_ids = np.zeros((capacity, 64), dtype=np.int64)
        self._out_logprobs = np.zeros((capacity, 64), dtype=np.float64)
        self._is_eos_V = np.zeros(served.vocab_size, dtype=bool)
        self._is_eos_V[[token for token in served.eos_ids if token < served.vocab_size]] = True
        self._knobs: dict[str, torch.Tensor | None] = {}
        self._watched: list[int] = []  # rows whose newest token needs a look
        self._columns_later = 0  # of the longest row once it has all its tokens
        self._cache = RowCache(self._prefill([[0, 0]]), served.device)

    @property
    def free(self) -> int:
        return self.rows_max - len(self.rows)

    # --- joining ---

    def join(self, rows: Sequence[Row], version: str) -> None:
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
        self._composition_changed()
        self._reserve_columns(1)
        by_prefix.pop((), None)  # a prompt of one token has nothing to prefill
        for chunk in _chunks(sorted(by_prefix, key=len)):
            prefilled = self._prefill(chunk)
            columns = len(chunk[-1])
            self._reserve_columns(columns)
            sources = [source for source, prefix in enumerate(chunk) for _ in by_prefix[prefix]]
            targets = [target for prefix in chunk for target in by_prefix[prefix]]
            self._cache.place(prefilled, sources, targets, columns)

    def _start_row(self, at: int, row: Row, version: str) -> None:
        request, ids, made = row.job.request, row.ids, len(row.output_ids)
        if not row.versions or row.versions[-1][0] != version:
            row.versions.append((version, made))
        params, eos = request.params, self.served.eos_ids
        own_stops = params.stop_token_ids - (frozenset() if params.ignore_eos else eos)
        self._state[at] = (
            *(row.key, len(ids) - 1, ids[-1], made, request.max_new_tokens),
            params.scale,
            self.served.vocab_size if params.top_k == -1 else params.top_k,
            *(params.top_p, params.min_p, params.greedy),
            not params.greedy and (params.top_k != -1 or params.top_p < 1 or params.min_p > 0),
            params.ignore_eos,
            bool(params.stop or own_stops),
        )
        self._reserve_outputs(made + 1)
        if made:  # it was retracted
            self._out_ids[at, :made], self._out_logprobs[at, :made] = row.output_ids, row.logprobs

    @torch.inference_mode()
    def _prefill(self, prefixes: Sequence[Sequence[int]]) -> Prefilled:
        """Keys and values of right-padded prefixes; every layer keeps all columns, sliding or not."""
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
    def step(self) -> list[tuple[Row, dict[str, Any]]]:
        """One token for every row. Rows that ended have left the batch and are returned with their finish reason."""
        count = len(self.rows)
        state = self._state[:count]
        logits_BV = self._forward(count)
        draws = torch.from_numpy(uniforms(state["key"], state["made"])).to(self._sampler)
        tokens, logprobs = sample(logits_BV.to(self._sampler), uniforms_B=draws, **self._knobs)
        tokens_B, logprobs_B = tokens.cpu().numpy(), logprobs.cpu().numpy()

        self._reserve_outputs(int(state["made"].max()) + 1)
        index_B = np.arange(count)
        self._out_ids[index_B, state["made"]] = tokens_B
        self._out_logprobs[index_B, state["made"]] = logprobs_B
        state["token"] = tokens_B
        state["made"] += 1
        state["length"] += 1

        ended_B = state["made"] >= state["made_max"]
        ended_B |= self._is_eos_V[tokens_B] & ~state["ignore_eos"]
        ended_B |= ~np.isfinite(logprobs_B)
        watched = {at: reason for at in self._watched if (reason := self._watch(at, int(tokens_B[at]))) is not None}
        ended = sorted({*np.flatnonzero(ended_B).tolist(), *watched})
        if not ended:
            return []
        reasons = [self._reason(at, int(tokens_B[at]), float(logprobs_B[at]), watched.get(at)) for at in ended]
        return list(zip(self.leave(ended), reasons, strict=True))

    def _forward(self, count: int) -> torch.Tensor:
        """Logits [B, V] of each row's next input token."""
        padded = max(count, self._rows_min)
        state = self._state[:padded]
        width = -(-(int(state["length"].max()) + 1) // WIDTH_STEP) * WIDTH_STEP
        self._reserve_columns(width)
        lengths_R = self._tensor(state["length"])
        self._cache.seek(lengths_R, width)
        tokens_R, masks = self._tensor(state["token"]), self.served.decode_mask(lengths_R, width)
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

    def _watch(self, at: int, token: int) -> dict[str, Any] | None:
        """The finish reason of a row with stops of its own, if its newest token made one."""
        params, made = self.rows[at].job.request.params, int(self._state["made"][at])
        if token in params.stop_token_ids:
            return {"type": "stop", "matched": token}
        if not params.stop:
            return None
        # Every token is at least one byte of text, so the stop string that this token ended is within this tail.
        longest = max(len(stop.encode()) for stop in params.stop)
        tail = self.served.decode(self._out_ids[at, max(0, made - longest - 1) : made].tolist(), False)
        return next(({"type": "stop", "matched": stop} for stop in params.stop if stop in tail), None)

    def _reason(self, at: int, token: int, logprob: float, watched: dict[str, Any] | None) -> dict[str, Any]:
        if not np.isfinite(logprob):
            return abort_reason("the model's logits are not finite: the served weights are broken", 500)
        if watched is not None:
            return watched
        if self._is_eos_V[token] and not self._state["ignore_eos"][at]:  # at the last place too, as in SGLang
            return {"type": "stop", "matched": token}
        return {"type": "length", "length": int(self._state["made_max"][at])}

    # --- leaving ---

    def leave(self, indices: Sequence[int]) -> list[Row]:
        """Take these rows (ascending indices) out, their outputs written back, and close the gaps they leave."""
        left = [self.rows[at] for at in indices]
        for at, row in zip(indices, left, strict=True):
            made = int(self._state["made"][at])
            row.output_ids = self._out_ids[at, :made].tolist()
            row.logprobs = self._out_logprobs[at, :made].tolist()
        gone, count = set(indices), len(self.rows) - len(indices)
        holes = [at for at in indices if at < count]
        movers = [at for at in range(count, len(self.rows)) if at not in gone]
        if movers:
            self._cache.move(movers, holes, int(self._state["length"][movers].max()))
            for values in (self._state, self._out_ids, self._out_logprobs):
                values[holes] = values[movers]
            for hole, mover in zip(holes, movers, strict=True):
                self.rows[hole] = self.rows[mover]
        del self.rows[count:]
        self._state[count:] = 0
        self._composition_changed()
        return left

    def drop_cache(self) -> None:
        """Give the cache's memory back. Only while no row runs."""
        assert not self.rows
        self._cache.drop()

    def note_version(self, version: str) -> None:
        """From here on, running rows are sampled with these weights."""
        for at, row in enumerate(self.rows):
            if row.versions[-1][0] != version:
                row.versions.append((version, int(self._state["made"][at])))

    # --- upkeep ---

    def _composition_changed(self) -> None:
        """Rebuild what depends on which rows run: the sampler's knobs and the rows whose stops need a look."""
        state = self._state[: len(self.rows)]
        self._watched = np.flatnonzero(state["watched"]).tolist()
        self._columns_later = int((state["length"] + state["made_max"] - state["made"]).max(initial=0))
        greedy, filtered, scaled = state["greedy"].any(), state["filtered"].any(), (state["temperature"] != 1).any()
        self._knobs = {
            "temperature_B1": self._knob("temperature")[:, None] if scaled else None,
            "greedy_B": self._knob("greedy") if greedy else None,
            "top_k_B1": self._knob("top_k")[:, None] if filtered else None,
            "top_p_B1": self._knob("top_p")[:, None] if filtered else None,
            "min_p_B1": self._knob("min_p")[:, None] if filtered else None,
        }

    def _reserve_columns(self, columns: int) -> None:
        self._cache.reserve(max(len(self.rows), self._rows_min), columns, self._columns_later)

    def _knob(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._state[name][: len(self.rows)].copy()).to(self._sampler)

    def _reserve_outputs(self, columns: int) -> None:
        have = self._out_ids.shape[1]
        if columns > have:
            grow = ((0, 0), (0, max(columns, 2 * have) - have))
            self._out_ids, self._out_logprobs = np.pad(self._out_ids, grow), np.pad(self._out_logprobs, grow)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.served.device, non_blocking=True)


def abort_reason(message: str, status_code: int | None = None) -> dict[str, Any]:
    err_type = None if status_code is None else "InternalServerError"
    return {"type": "abort", "message": message, "status_code": status_code, "err_type": err_type}


def _chunks(prefixes: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Prefixes, shortest first, split so that none of the padded prefills exceeds PREFILL_TOKENS_MAX (or holds one)."""
    chunks: list[list[tuple[int, ...]]] = []
    for prefix in prefixes:
        if chunks and len(prefix) * (len(chunks[-1]) + 1) <= PREFILL_TOKENS_MAX:
            chunks[-1].append(prefix)
        else:
            chunks.append([prefix])
    return chunks
