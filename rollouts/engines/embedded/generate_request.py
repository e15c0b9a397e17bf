"""Parse /generate bodies into typed requests, and write finished rows as JSON. Pure; no torch, no I/O.

Names, defaults and answers follow SGLang 0.5 (`sglang/srt/sampling/sampling_params.py`, `managers/io_struct.py`).
What the embedded engine cannot do is refused with a 400, never ignored, unless SGLang itself ignores it.
"""

import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

VERSION = (
    "1"  # of the routes, for clients that ask; new with every change that old clients would misread
)
GREEDY_BELOW_TEMPERATURE = 1e-6
SEEDS = 2**63
N_MAX = 65536

# SGLang accepts these; here only their neutral value is served.
_UNSUPPORTED_PARAMS: Mapping[str, Any] = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "stop_regex": None,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "custom_params": None,
    "stream_interval": None,
    "logit_bias": None,
    "spaces_between_special_tokens": True,
}
_SUPPORTED_PARAMS = (
    *("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "n", "sampling_seed"),
    *("stop", "stop_token_ids", "ignore_eos", "skip_special_tokens", "no_stop_trim"),
)
# Top-level keys that change the answer and are not served; other unknown keys are ignored, as SGLang does.
_UNSUPPORTED_KEYS = (
    "input_embeds",
    "image_data",
    "audio_data",
    "video_data",
    "lora_path",
    "session_params",
)


class BadRequest(ValueError):
    """The caller's mistake: answered with 400 and this message."""


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued. `top_k=-1` and `max_new_tokens=None` mean no limit; greedy is `temperature=0`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    max_new_tokens: int | None = 128
    n: int = 1
    sampling_seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW_TEMPERATURE or self.top_k == 1

    @property
    def scale(self) -> float:
        """Return the divisor of logits before log-probs are taken; at temperature 0 they are raw, as in SGLang."""
        return self.temperature if self.temperature >= GREEDY_BELOW_TEMPERATURE else 1.0


@dataclass(frozen=True)
class PromptRequest:
    """One prompt of a /generate body, sampled as `params.n` rows."""

    rid: str
    input_ids: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int  # params.max_new_tokens, or the room left in the context
    return_logprob: bool
    logprob_start: int  # first prompt position whose log-prob is asked for; len(input_ids): none


@dataclass(frozen=True)
class GenerateRequest:
    prompts: tuple[PromptRequest, ...]
    single: bool  # answer with one object, not a list


@dataclass
class RowResult:
    """What one row produced: [T] ids and natural log-probs, why it ended, and which weights made which tokens."""

    output_ids: list[int]
    logprobs: list[float]
    finish_reason: dict[str, Any]
    cached_tokens: int
    versions: list[tuple[str, int]]  # (weight version, first output index sampled with it)
    input_logprobs: list[list[Any]] = field(default_factory=list)


@dataclass(frozen=True)
class ServedLimits:
    """What the served model allows."""

    context_length: int
    vocab_size: int
    encode: Callable[[str], list[int]] | None  # None: the model directory has no tokenizer


# --- in -------------------------------------------------------------------------------------------------------------


def parse_generate(body: Any, limits: ServedLimits) -> GenerateRequest:
    """Return a decoded /generate body as requests. Raises BadRequest with what is wrong and what is allowed."""
    if not isinstance(body, dict):
        raise BadRequest(f"the body needs to be a JSON object, found {type(body).__name__}")
    _refuse_unsupported(body)
    input_ids, single = _prompts(body, limits)
    count = len(input_ids)
    params = [
        parse_sampling_params(item)
        for item in _per_prompt(body.get("sampling_params") or {}, count, "object")
    ]
    if len({item.n for item in params}) > 1:
        raise BadRequest("sampling_params.n: needs to be the same for all prompts of a batch")
    logprob = _per_prompt(body.get("return_logprob") or False, count, "return_logprob")
    starts = _per_prompt(body.get("logprob_start_len", -1), count, "logprob_start_len")
    rids = _rids(body.get("rid"), count, single)
    prompts = []
    for ids, item, wants, start, rid in zip(input_ids, params, logprob, starts, rids, strict=True):
        max_new_tokens = _check_prompt(ids, item, limits)
        first = (
            len(ids) if start in (None, -1) or not wants else _integer(start, "logprob_start_len")
        )
        if not 0 <= first <= len(ids):
            raise BadRequest(
                f"logprob_start_len={start}: needs -1, or 0 to {len(ids)} for this prompt"
            )
        prompts.append(PromptRequest(rid, tuple(ids), item, max_new_tokens, bool(wants), first))
    return GenerateRequest(tuple(prompts), single and params[0].n == 1)


def parse_sampling_params(data: Any) -> SamplingParams:
    """Return the `sampling_params` of one prompt. null means the default, as in SGLang. Raises BadRequest."""
    if not isinstance(data, dict):
        raise BadRequest(f"sampling_params: needs an object, found {type(data).__name__}")
    unknown = sorted(set(data) - set(_SUPPORTED_PARAMS) - set(_UNSUPPORTED_PARAMS))
    if unknown:
        raise BadRequest(
            f"sampling_params: unexpected keys {unknown}; known are {', '.join(_SUPPORTED_PARAMS)}"
        )
    for name, neutral in _UNSUPPORTED_PARAMS.items():
        if data.get(name) not in (None, neutral):
            raise BadRequest(
                f"sampling_params.{name}={data[name]!r}: the embedded engine does not support it"
            )
    given = {
        name: value
        for name, value in data.items()
        if name in _SUPPORTED_PARAMS and value is not None
    }
    if "max_new_tokens" in data and data["max_new_tokens"] is None:
        given["max_new_tokens"] = None
    for name in ("temperature", "top_p", "min_p"):
        if name in given:
            given[name] = _number(given[name], f"sampling_params.{name}")
    for name in ("top_k", "n", "sampling_seed", "max_new_tokens"):
        if given.get(name) is not None:
            given[name] = _integer(given[name], f"sampling_params.{name}")
    for name in ("ignore_eos", "skip_special_tokens", "no_stop_trim"):
        if name in given and not isinstance(given[name], bool):
            raise BadRequest(f"sampling_params.{name}={given[name]!r}: needs true or false")
    given["stop"] = _stop_strings(given.get("stop"))
    given["stop_token_ids"] = frozenset(
        _integer(token, "sampling_params.stop_token_ids")
        for token in _list(given.get("stop_token_ids", []), "sampling_params.stop_token_ids")
    )
    params = SamplingParams(**given)
    _check_ranges(params)
    return params


def _check_ranges(params: SamplingParams) -> None:
    finite = math.isfinite(params.temperature)
    new_tokens, seed = params.max_new_tokens, params.sampling_seed
    checks = (
        (
            finite and params.temperature >= 0,
            f"temperature={params.temperature}: needs a finite number >= 0",
        ),
        (0 < params.top_p <= 1, f"top_p={params.top_p}: needs 0 < top_p <= 1"),
        (0 <= params.min_p <= 1, f"min_p={params.min_p}: needs 0 <= min_p <= 1"),
        (
            params.top_k == -1 or params.top_k >= 1,
            f"top_k={params.top_k}: needs >= 1, or -1 for all tokens",
        ),
        (new_tokens is None or new_tokens >= 0, f"max_new_tokens={new_tokens}: needs >= 0"),
        (1 <= params.n <= N_MAX, f"n={params.n}: needs 1 to {N_MAX}"),
        (seed is None or 0 <= seed < SEEDS, f"sampling_seed={seed}: needs 0 to 2**63 - 1"),
    )
    for ok, message in checks:
        if not ok:
            raise BadRequest(f"sampling_params.{message}")


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    if body.get("stream"):
        raise BadRequest(
            "stream=true: the embedded engine answers in one piece; leave `stream` out"
        )
    if body.get("top_logprobs_num"):
        raise BadRequest(
            f"top_logprobs_num={body['top_logprobs_num']!r}: the embedded engine does not support it"
        )
    if body.get("token_ids_logprob"):
        raise BadRequest("token_ids_logprob: the embedded engine does not support it")
    for key in _UNSUPPORTED_KEYS:
        if body.get(key) is not None:
            raise BadRequest(f"{key}: the embedded engine does not support it")


def _prompts(body: Mapping[str, Any], limits: ServedLimits) -> tuple[list[list[int]], bool]:
    """Return the prompts' ids, and whether the body holds one prompt rather than a batch."""
    text, ids = body.get("text"), body.get("input_ids")
    if (text is None) == (ids is None):
        raise BadRequest("needs exactly one of `text` and `input_ids`")
    if text is not None:
        single = isinstance(text, str)
        texts = [text] if single else _list(text, "text")
        if not texts or not all(isinstance(item, str) for item in texts):
            raise BadRequest("text: needs a string, or a list of at least one string")
        if limits.encode is None:
            raise BadRequest("text: the served model directory has no tokenizer; send `input_ids`")
        return [limits.encode(item) for item in texts], single
    _list(ids, "input_ids")
    if not ids:
        raise BadRequest("input_ids: empty; a prompt needs at least one token")
    single = not isinstance(ids[0], list)
    prompts = [ids] if single else ids
    for prompt in prompts:
        for token in _list(prompt, "input_ids"):
            if type(token) is not int:
                raise BadRequest(f"input_ids: needs integers, found {token!r}")
    return prompts, single


def _check_prompt(ids: Sequence[int], params: SamplingParams, limits: ServedLimits) -> int:
    """Check the bounds of one prompt; return how many tokens it may grow by."""
    if not ids:
        raise BadRequest("input_ids: empty; a prompt needs at least one token")
    if min(ids) < 0 or max(ids) >= limits.vocab_size:
        bad = next(token for token in ids if not 0 <= token < limits.vocab_size)
        raise BadRequest(
            f"input_ids: token id {bad} is outside the vocabulary, needs 0 to {limits.vocab_size - 1}"
        )
    room = limits.context_length - len(ids)
    wanted = max(room, 0) if params.max_new_tokens is None else params.max_new_tokens
    if wanted > room or room < 0:
        raise BadRequest(
            f"Requested token count exceeds the model's maximum context length of {limits.context_length} tokens: "
            f"{len(ids)} in the prompt + {wanted} to generate"
        )
    if params.stop and limits.encode is None:
        raise BadRequest(
            "sampling_params.stop: the served model directory has no tokenizer; use stop_token_ids"
        )
    return wanted


def _per_prompt(value: Any, count: int, name: str) -> list[Any]:
    """Return a list with one value for each prompt; `value` is such a list, or the value of all."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise BadRequest(f"{name}: {len(value)} entries for {count} prompts")
    return value


def _rids(value: Any, count: int, single: bool) -> list[str]:
    if value is None:
        return [uuid.uuid4().hex for _ in range(count)]
    rids = [value] if single else value
    if (
        not isinstance(rids, list)
        or len(rids) != count
        or not all(isinstance(rid, str) and rid for rid in rids)
    ):
        raise BadRequest(
            "rid: needs a string for one prompt, a list with one string per prompt for a batch"
        )
    if len(set(rids)) != count:
        raise BadRequest("rid: the same id twice in one batch")
    return rids


def _stop_strings(value: Any) -> tuple[str, ...]:
    values = (
        [value]
        if isinstance(value, str)
        else _list(value if value is not None else [], "sampling_params.stop")
    )
    if not all(isinstance(item, str) and item for item in values):
        raise BadRequest(
            f"sampling_params.stop={value!r}: needs a string or a list of strings, none empty"
        )
    return tuple(values)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadRequest(f"{name}: needs a list, found {type(value).__name__}")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{name}={value!r}: needs a number")
    return float(value)


def _integer(value: Any, name: str) -> int:
    if type(value) is not int:
        raise BadRequest(f"{name}={value!r}: needs an integer")
    return value


# --- out ------------------------------------------------------------------------------------------------------------

Decode = Callable[[list[int], bool], str]  # (ids, skip_special_tokens) -> text


def row_to_json(
    request: PromptRequest, row: int, result: RowResult, decode: Decode | None
) -> dict[str, Any]:
    """Return one entry of the answer. It lacks `text` where the model directory has no tokenizer."""
    params, count = request.params, len(result.output_ids)
    starts = [start for _, start in result.versions]
    meta: dict[str, Any] = {
        "id": request.rid if params.n == 1 else f"{request.rid}-{row}",
        "finish_reason": result.finish_reason,
        "prompt_tokens": len(request.input_ids),
        "completion_tokens": count,
        "cached_tokens": result.cached_tokens,
        "weight_version": result.versions[-1][0],
        "weight_versions": [
            {"version": version, "start": start, "end": end}
            for (version, start), end in zip(result.versions, [*starts[1:], count], strict=True)
        ],
    }
    if request.return_logprob:
        pairs = zip(result.logprobs, result.output_ids, strict=True)
        meta["output_token_logprobs"] = [[logprob, token, None] for logprob, token in pairs]
        meta["input_token_logprobs"] = result.input_logprobs
    answer = {"output_ids": result.output_ids, "meta_info": meta}
    if decode is not None:
        answer = {"text": _text(params, result, decode), **answer}
    return answer


def _text(params: SamplingParams, result: RowResult, decode: Decode) -> str:
    """Return the decoded output, up to its stop (unless no_stop_trim); `output_ids` always keep all of it."""
    matched = result.finish_reason.get("matched")
    trim = not params.no_stop_trim
    ids = result.output_ids[:-1] if trim and isinstance(matched, int) else result.output_ids
    text = decode(ids, params.skip_special_tokens)
    if trim and isinstance(matched, str) and matched in text:
        return text[: text.index(matched)]
    return text
