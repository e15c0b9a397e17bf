"""The keys of a run's engines: which route wants which, that they do not show, that servers and client heed them."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest

from rollouts.engines.keys import (
    ADMIN_KEY_VARIABLE,
    API_KEY_VARIABLE,
    Key,
    is_allowed,
    key_for,
    new_keys,
    read_keys,
)
from rollouts.engines.sglang.launcher import hidden
from rollouts.engines.vllm.guard import KeyGuard
from rollouts.training.weight_sync import EngineError, SGLangEngine
from tests.engines.serving import CONTEXT, PROMPT, make_model, serving

KEYS = {API_KEY_VARIABLE: "the-api-key", ADMIN_KEY_VARIABLE: "the-admin-key"}
RULES = [
    ("/ready", None),
    ("/health_generate", None),
    ("/generate", "api"),
    ("/model_info", "api"),
    ("/v1/completions", "api"),
    ("/flush_cache", "admin"),
    ("/abort_request", "admin"),
    ("/pause_generation", "admin"),
    ("/update_weights_from_disk", "admin"),
]


@pytest.mark.parametrize(("path", "key"), RULES)
def test_each_route_takes_its_own_key(path: str, key: str | None) -> None:
    """Goal: SGLang's rules: the api key samples, the admin key alone changes anything. Red with one key for both."""
    assert key_for(path, "api", "admin") == key
    assert is_allowed(path, f"Bearer {key}", "api", "admin")
    for other in (
        "",
        "Bearer",
        "Bearer other",
        f"Basic {key}",
        "Bearer api" if key == "admin" else "Bearer admin",
    ):
        assert is_allowed(path, other, "api", "admin") is (key is None), other


def test_a_server_without_keys_asks_for_none() -> None:
    """Goal: a server that was given no key serves everybody, as in tests; with one key, that one. Red with None taken
    for a key."""
    assert is_allowed("/generate", "", None, None) and is_allowed("/flush_cache", "", None, None)
    assert key_for("/flush_cache", "api", None) == "api"


def test_a_key_does_not_show_in_a_record() -> None:
    """Goal: a printed dict of arguments hides it, after a copy and in another process too. Red with a plain str."""
    key = Key("secret")
    for same in (key, copy.deepcopy(key), pickle.loads(pickle.dumps(key))):
        assert (
            "secret" not in repr({"api_key": same})
            and same == "secret"
            and f"Bearer {same}" == "Bearer secret"
        )


def test_keys_go_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: what is made is what is read, and never made twice. Red with a fixed key."""
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    monkeypatch.delenv(ADMIN_KEY_VARIABLE, raising=False)
    assert read_keys() == (None, None)
    made, again = new_keys(), new_keys()
    assert len({*made.values(), *again.values()}) == 4 and all(
        len(key) >= 40 for key in made.values()
    )
    for name, key in made.items():
        monkeypatch.setenv(name, key)
    assert read_keys() == (made[API_KEY_VARIABLE], made[ADMIN_KEY_VARIABLE])


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An embedded engine with KEYS, and a context shorter than its model's."""
    model = make_model("qwen2-tied", tmp_path_factory.mktemp("guarded"), seed=0)
    with serving(model, environment=KEYS, context_length="64") as url:
        yield url


def test_the_embedded_engine_wants_its_keys(guarded: str) -> None:
    """Goal: 401 without the key of the route, also on one that changes weights; readiness is no secret. Red with the
    check left out of the server, and with one key for all of its routes."""
    with httpx.Client(base_url=guarded, timeout=60) as client:

        def status(method: str, route: str, key: str | None) -> int:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return client.request(method, route, headers=headers).status_code

        api, admin = KEYS.values()
        assert [status("GET", route, None) for route in ("/health", "/ready")] == [200, 200]
        assert [status("GET", "/model_info", key) for key in (api, admin, "x", None)] == [
            200,
            401,
            401,
            401,
        ]
        assert [status("POST", "/flush_cache", key) for key in (admin, api, "x", None)] == [
            200,
            401,
            401,
            401,
        ]
        refused = client.post("/update_weights_from_disk", json={"model_path": "/nowhere"})
        assert refused.status_code == 401 and refused.json()["error"]["message"] == "Unauthorized"


async def _use(url: str, **keys: str) -> tuple[int, str]:
    async with SGLangEngine(url, **keys) as engine:
        (answer,) = await engine.generate(PROMPT, {"max_new_tokens": 3, "ignore_eos": True})
        await engine.pause("retract")
        await engine.flush_cache()
        await engine.resume()
        return len(answer.output_ids), (await engine.model_info())["weight_version"]


def test_the_client_sends_the_key_that_a_route_wants(guarded: str) -> None:
    """Goal: a client with both keys may do all, one with the api key samples and no more. Red with the api key sent
    everywhere."""
    api, admin = KEYS.values()
    assert anyio.run(lambda: _use(guarded, api_key=api, admin_key=admin)) == (3, "default")
    with pytest.raises(EngineError, match="/pause_generation: 401: Unauthorized"):
        anyio.run(lambda: _use(guarded, api_key=api))
    with pytest.raises(EngineError, match="_info: 401: Unauthorized"):
        anyio.run(lambda: _use(guarded))


def test_context_length_is_a_bound(guarded: str) -> None:
    """Goal: engine.context_length shortens what a prompt and its answer may take; the model's own bound stays one.
    Red with the flag not read."""
    with httpx.Client(
        base_url=guarded, headers={"Authorization": f"Bearer {KEYS[API_KEY_VARIABLE]}"}
    ) as client:
        assert client.get("/server_info").json()["context_length"] == 64 < CONTEXT
        body = {"input_ids": [2] * 60, "sampling_params": {"max_new_tokens": 5}}
        assert client.post("/generate", json=body).status_code == 400


@pytest.mark.parametrize(("path", "key"), RULES)
def test_vllm_is_behind_the_same_keys(
    monkeypatch: pytest.MonkeyPatch, path: str, key: str | None
) -> None:
    """Goal: the middleware lets through what has its route's key, and nothing else reaches vLLM; what is not HTTP (its
    start) goes through. Red with the guard handing everything on."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    async def ask(headers: list[tuple[bytes, bytes]]) -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await KeyGuard(app)({"type": "http", "path": path, "headers": headers}, None, send)  # type: ignore[arg-type]
        await KeyGuard(app)({"type": "lifespan"}, None, send)  # type: ignore[arg-type]
        return sent

    wanted = {"api": KEYS[API_KEY_VARIABLE], "admin": KEYS[ADMIN_KEY_VARIABLE], None: "x"}[key]
    assert anyio.run(ask, [(b"authorization", f"Bearer {wanted}".encode())]) == []
    assert reached == ["http", "lifespan"]
    refused = anyio.run(ask, [(b"other", b"x")])
    assert [message.get("status") for message in refused] == ([401, None] if key else [])


@pytest.mark.parametrize(
    ("headers", "passes"), [([], False), ([(b"authorization", b"Bearer the-api-key")], True)]
)
def test_vllms_websockets_want_a_key_too(
    monkeypatch: pytest.MonkeyPatch, headers: Any, passes: bool
) -> None:
    """Goal: a websocket samples as a request does (/v1/realtime): closed before it is accepted without the key. Red
    with HTTP alone guarded."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    reached: list[str] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    async def send(message: Any) -> None:
        sent.append(message["type"])

    anyio.run(
        KeyGuard(app), {"type": "websocket", "path": "/v1/realtime", "headers": headers}, None, send
    )
    assert (reached, sent) == ((["websocket"], []) if passes else ([], ["websocket.close"]))


def test_what_a_server_tells_of_itself_has_no_key() -> None:
    """Goal: SGLang's /server_info has its arguments twice, the scheduler's in a list; neither shows a key. Red with
    the list left alone."""
    told = {
        "api_key": "a",
        "internal_states": [{"admin_api_key": "b", "port": 1}],
        "ssl_keyfile": None,
    }
    shown = {
        "api_key": "***",
        "internal_states": [{"admin_api_key": "***", "port": 1}],
        "ssl_keyfile": None,
    }
    assert hidden(told, ["a", "b"]) == shown and hidden(told, []) == told
