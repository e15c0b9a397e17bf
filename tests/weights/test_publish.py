"""Whole syncs, of every kind, to the embedded engine and to the real SGLang on a CPU."""

import copy
import itertools
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.inference.http import EngineError, EngineLost
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.inference.weight_routes import Adapter
from rollouts.training.rl_losses import grpo_loss
from rollouts.training.weight_sync import SGLangEngine, WeightSyncError
from rollouts.training.weights.deliver import bucket_source
from rollouts.training.weights.gather import plan_buckets
from tests.engines.serving import await_health, config_of, embedded_argv, start
from tests.ports import free_port
from tests.weights.deliveries import (
    BUCKET_BYTES,
    IDS,
    LORA,
    backend_over,
    change,
    delivery_of,
    expected_logprobs,
    lora_backend,
    publisher_of,
)
from tests.weights.test_wire import mapped_files

pytestmark = pytest.mark.anyio


@pytest.fixture
def backend(models: dict[str, Path], tmp_path: Path) -> PyTorchTrainingBackend:
    return backend_over(models["new"], tmp_path / "checkpoints")


# The real server takes its time: it is asked once, by the one event loop or the other.
with_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])
with_trio = pytest.mark.parametrize("anyio_backend", ["trio"])


@pytest.mark.parametrize(
    ("kind", "url", "anyio_backend"),
    [
        ("disk", "embedded", "trio"),
        ("tensor", "embedded", "asyncio"),
        ("disk", "sglang", "asyncio"),
        ("tensor", "sglang", "trio"),
        ("broadcast", "sglang", "asyncio"),
    ],
    indirect=["url"],
)
async def test_the_engine_serves_the_trainers_weights(
    kind: str, url: str, backend: Any, tmp_path: Path
) -> None:
    """Goal: after each of two syncs the engine scores and samples with the trainer's weights, tied embeddings
    included, under the version asked for, unpaused; a request that was under way goes on. Nothing stays behind.

    Red with the buffer not filled again for the second sync, and with the last bucket left out.
    """
    async with SGLangEngine(url, timeout_s=200) as engine:
        delivery = delivery_of(kind, backend, tmp_path / "weights")
        publisher = publisher_of(backend, [engine], delivery)
        async with anyio.create_task_group() as group:
            finished: list[Any] = []

            async def ask() -> None:
                (row,) = await engine.generate(IDS, {"max_new_tokens": 150, "ignore_eos": True})
                finished.append(row)

            await publisher.publish(1)
            group.start_soon(ask)
            await anyio.sleep(0.1)
            change(backend, seed=1)
            await publisher.publish(2)
        assert await engine.input_logprobs(IDS) == pytest.approx(
            expected_logprobs(backend.model), abs=1e-5
        )
        (row,) = await engine.generate(IDS, {"max_new_tokens": 1})
        assert row.weight_version == "2"
        assert len(finished[0].output_ids) == 150 and finished[0].finish_reason == "length"
        left = [buffer.file for buffer in getattr(delivery, "_buffers", ()) if buffer.file]
        assert len(left) == (3 if kind == "tensor" else 0)
        await publisher.aclose()
    assert not any(file.exists() for file in (*left, tmp_path / "weights"))


@with_asyncio
async def test_sglang_keeps_the_buffers_mapped(
    sglang_url: str, backend: Any, tmp_path: Path
) -> None:
    """Goal: the real server maps the trainer's buffers once, not at every sync, and lets go of those that the trainer
    has removed once it reads others. Red with the launcher's `keep_mappings` left out.
    """

    def readers(delivery: Any) -> set[int]:
        names = {buffer.file.name for buffer in delivery._buffers}
        mine = [
            pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if pid != os.getpid()
        ]
        return {pid for pid in mine if names <= {name.split()[0] for name in mapped_files(pid)}}

    async with SGLangEngine(sglang_url, timeout_s=200) as engine:
        first, second = (delivery_of("tensor", backend, tmp_path) for _ in range(2))
        await first.deliver([engine], "1")
        assert len(first._buffers) == 3
        (scheduler,) = readers(first)
        await first.deliver([engine], "2")
        assert readers(first) == {scheduler}
        await first.aclose([engine])
        await second.deliver([engine], "3")
        assert readers(second) == {scheduler}
        assert not [name for name in mapped_files(scheduler) if name.endswith("(deleted)")]
        await second.aclose([engine])


@pytest.mark.parametrize("fails", [False, True])
async def test_sends_overlap_and_no_buffer_changes_under_one(
    fails: bool, embedded_url: str, backend: Any, tmp_path: Path
) -> None:
    """Goal: while a bucket is being loaded the next is under way and a third is filled, yet no buffer is written
    before its engine has answered, and the bucket that names the version goes when all others were loaded; where one
    failed it never goes. Red with a buffer fewer, and with the last bucket sent like the others.
    """
    async with SGLangEngine(embedded_url, timeout_s=200) as engine:
        delivery = delivery_of("tensor", backend, tmp_path)
        put, under_way, most, labels = delivery._channel.put, [], [], []
        buckets = len(plan_buckets(backend.model, None, BUCKET_BYTES))

        async def slow(engines: Any, buffer: Any, entries: Any, version: str | None) -> None:
            under_way.append(buffer.file)
            most.append(len(under_way))
            labels.append(version)
            assert version is None or len(under_way) == 1, "a version means all of it"
            before = buffer.flat.clone()
            await anyio.sleep(0.2 if len(labels) == buckets - 1 else 0.03)
            await put(engines, buffer, entries, version)
            assert torch.equal(buffer.flat, before), "filled again while it was read"
            under_way.remove(buffer.file)
            if fails and len(labels) == 2:
                raise WeightSyncError("lost")

        delivery._channel.put = slow
        if fails:
            with pytest.raises(WeightSyncError, match=r"version 32: lost.*left paused"):
                await delivery.deliver([engine], "32")
            assert "32" not in labels and (await engine.model_info())["weight_version"] != "32"
        else:
            await delivery.deliver([engine], "31")
            assert max(most) == 2 and labels[-1] == "31" and not any(labels[:-1])
            assert await engine.input_logprobs(IDS) == pytest.approx(
                expected_logprobs(backend.model), abs=1e-5
            )
        await delivery.aclose([engine])


@with_trio
async def test_the_group_is_gone_afterwards(sglang_url: str, backend: Any, tmp_path: Path) -> None:
    """Goal: neither side keeps the process group."""
    async with SGLangEngine(sglang_url, timeout_s=200) as engine:
        delivery = delivery_of("broadcast", backend, tmp_path)
        await publisher_of(backend, [engine], delivery).publish(1)
        name = delivery._channel._joined.name
        await delivery.aclose([engine])
        with pytest.raises(EngineError, match="does not exist"):
            await engine.weights.destroy_weights_update_group(name)
        assert name not in torch.distributed.distributed_c10d._world.pg_names.values()


class Liar:
    """A delivery that moves nothing and says it did."""

    async def deliver(self, clients: Any, version: str) -> None:
        for client in clients:
            await client.request(
                "POST",
                "/update_weight_version",
                {"new_version": version, "abort_all_requests": False},
            )

    async def restore(self, client: Any, version: str) -> None: ...

    async def aclose(self, clients: Any) -> None: ...


@with_asyncio
async def test_a_version_is_no_proof(url: str, backend: Any) -> None:
    """Goal: an engine that says the new version and serves other weights ends the run, paused. Red: no probe."""
    change(backend, seed=7)
    async with SGLangEngine(url, timeout_s=200) as engine:
        publisher = publisher_of(backend, [engine], Liar())  # type: ignore[arg-type]
        with pytest.raises(
            WeightSyncError, match=r"does not serve the trainer's weights.*The engines are paused"
        ):
            await publisher.publish(3)
        with anyio.move_on_after(0.3) as waited:
            await engine.generate(IDS, {"max_new_tokens": 1})
        assert waited.cancelled_caught
        await engine.resume()


@with_asyncio
async def test_order_around_training(sglang_url: str, backend: Any, tmp_path: Path) -> None:
    """Goal: the engine gives memory back only while idle, has it again before weights come, and samples afterwards;
    the real server agrees at each step.
    """
    paths: list[str] = []

    class Watched(SGLangEngine):
        async def request(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
            paths.append(path.split("?", maxsplit=1)[0])
            return await super().request(method, path, body, **options)

    async with Watched(sglang_url, timeout_s=200) as engine:
        delivery = delivery_of("tensor", backend, tmp_path)
        publisher = publisher_of(backend, [engine], delivery, sleep_while_training=True)
        await publisher.publish(4)
        paths.clear()
        await publisher.sleep(weights=True)
        await publisher.publish(5)
        assert paths[:5] == [
            *("/pause_generation", "/flush_cache", "/release_memory_occupation"),
            *("/resume_memory_occupation", "/pause_generation"),
        ]
        paths.clear()
        await publisher.sleep(weights=False)
        await publisher.wake()
        assert paths[-2:] == ["/resume_memory_occupation", "/continue_generation"]
        assert (await engine.generate(IDS, {"max_new_tokens": 2}))[0].weight_version == "5"
        await publisher.aclose()


async def test_tensors_that_do_not_fit(
    embedded_url: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Goal: a trainer of another shape is refused by name and shape. Red with the embedded engine's check left out."""
    config = config_of("qwen2-tied")
    config.intermediate_size = 96
    model = Qwen2ForCausalLM(config)
    backend = PyTorchTrainingBackend(
        model, torch.optim.SGD(model.parameters()), grpo_loss, tmp_path
    )
    async with SGLangEngine(embedded_url, timeout_s=200) as engine:
        with pytest.raises(
            WeightSyncError,
            match=r"gate_proj.weight has shape \[96, 64\].*\[128, 64\].*left paused",
        ):
            await delivery_of("tensor", backend, tmp_path).deliver([engine], "9")
        fitting = backend_over(models["new"], tmp_path)
        await publisher_of(fitting, [engine], delivery_of("tensor", fitting, tmp_path)).publish(10)


async def test_a_gather_that_fails(
    embedded_url: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: what the trainer's own side raises between two buckets comes as it is, and the engine can be sent to again.
    Red with the engine's errors alone looked after: an ExceptionGroup, and the session left open."""
    fill, calls = bucket_source.fill, itertools.count()

    def failing(*arguments: Any) -> None:
        if next(calls) == 1:
            raise ZeroDivisionError("while gathering")
        fill(*arguments)

    async with SGLangEngine(embedded_url, timeout_s=200) as engine:
        backend = backend_over(models["new"], tmp_path)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(bucket_source, "fill", failing)
            await delivery_of("tensor", backend, tmp_path).deliver([engine], "9")
        fitting = backend_over(models["new"], tmp_path)  # the other one refuses all further work
        await publisher_of(fitting, [engine], delivery_of("tensor", fitting, tmp_path)).publish(10)


@pytest.mark.parametrize(
    ("number", "anyio_backend"), [(signal.SIGKILL, "asyncio"), (signal.SIGSTOP, "trio")]
)
async def test_an_engine_that_dies_or_hangs_over_it(
    number: signal.Signals, models: dict[str, Path], backend: Any, tmp_path: Path
) -> None:
    """Goal: an engine that goes away between two buckets is an error within the client's time limit, naming it."""
    process, url = engine_process(models["old"], free_port())
    try:
        async with SGLangEngine(url, timeout_s=2) as engine:
            delivery = delivery_of("tensor", backend, tmp_path)
            put = delivery._channel.put

            async def put_then_kill(*arguments: Any) -> None:
                await put(*arguments)
                process.send_signal(number)

            delivery._channel.put = put_then_kill
            with anyio.fail_after(100), pytest.raises(WeightSyncError, match=f"version 1: .*{url}"):
                await delivery.deliver([engine], "1")
            await delivery.aclose([engine])
    finally:
        process.kill()


@with_asyncio
async def test_an_engine_that_comes_back(
    models: dict[str, Path], backend: Any, tmp_path: Path
) -> None:
    """Goal: an engine that was started again, and serves its start model, has the last sync's weights before a request
    is answered.
    """
    port = free_port()
    process, url = engine_process(models["old"], port)
    try:
        pool = EnginePool([SGLangEngine(url, timeout_s=200)], reruns_max=3, recover_timeout_s=200)
        publisher = publisher_of(backend, pool, delivery_of("tensor", backend, tmp_path))
        await publisher.publish(1)
        process.kill()
        process.wait()
        process, _ = engine_process(models["old"], port)
        (row,) = await pool.generate(IDS, {"max_new_tokens": 3})
        assert row.weight_version == "1"
        assert await pool.replicas[0].input_logprobs(IDS) == pytest.approx(
            expected_logprobs(backend.model), abs=1e-5
        )
        await publisher.aclose()
        await pool.aclose()
    finally:
        process.kill()


@pytest.fixture
def adapted(models: dict[str, Path], tmp_path: Path) -> PyTorchTrainingBackend:
    """Adapters over a base that no engine was given."""
    return lora_backend(
        Path(shutil.copytree(models["new"], tmp_path / "base")), tmp_path / "checkpoints"
    )


@with_trio
async def test_adapters_alone(sglang_url: str, adapted: Any, tmp_path: Path) -> None:
    """Goal: after each of two syncs the engine scores and samples with the trainer's unmerged adapter, over the
    trainer's frozen weights (it starts with others), under the version asked for; a request that was under way ends
    with the adapter it started with, and says so. Only the last adapter stays, and nothing but adapters was written.

    Red with requests that name no adapter, without the base, with the server's own word on versions, and with the
    adapter before left loaded.
    """
    directory = tmp_path / "weights"
    async with SGLangEngine(sglang_url, timeout_s=200) as engine:
        publisher = publisher_of(adapted, [engine], delivery_of("lora", adapted, directory))
        change(adapted, seed=1)
        before = copy.deepcopy(adapted.model)
        async with anyio.create_task_group() as group:
            finished: list[Any] = []

            async def ask() -> None:
                finished.extend(
                    await engine.generate(IDS, {"max_new_tokens": 100, "ignore_eos": True})
                )

            await publisher.publish(1)
            group.start_soon(ask)
            await anyio.sleep(0.3)
            change(adapted, seed=2)
            await publisher.publish(2)
        assert await engine.input_logprobs(IDS) == pytest.approx(
            expected_logprobs(adapted.model), abs=1e-5
        )
        (row,) = await engine.generate(IDS, {"max_new_tokens": 20, "ignore_eos": True})
        for model, answer, version in ((before, finished[0], "1"), (adapted.model, row, "2")):
            expected = expected_logprobs(model, [*IDS, *answer.output_ids])[len(IDS) - 1 :]
            assert answer.logprobs == pytest.approx(expected, abs=1e-4)
            assert answer.weight_version == version
            assert answer.weight_versions == [
                {"version": version, "start": 0, "end": len(answer.output_ids)}
            ]
        (loaded,) = await engine.weights.load_adapter(
            "another", str(directory / "version_000002")
        ) - {"another"}
        await engine.weights.unload_adapter("another")
        assert engine.weights.adapter is not None and engine.weights.adapter.name == loaded
        files = {file.name for file in directory.rglob("*") if file.is_file()}
        assert files == {"adapter_config.json", "adapter_model.safetensors", "base.json"}
        await publisher.aclose()
    assert not directory.exists()


@with_asyncio
async def test_an_engine_that_comes_back_without_the_adapter(
    sglang_url: str, models: dict[str, Path], adapted: Any, tmp_path: Path
) -> None:
    """Goal: an engine that knows no such adapter, and serves its start model under its first version, as one that was
    started again, has base and adapter before a request is answered. Red with its refusal raised as the caller's.
    """
    recovered: list[Any] = []
    client = SGLangEngine(sglang_url, timeout_s=200)
    pool = EnginePool([client], reruns_max=3, recover_timeout_s=60, on_recovered=recovered.append)
    publisher = publisher_of(adapted, pool, delivery_of("lora", adapted, tmp_path / "weights"))
    change(adapted, seed=4)
    await publisher.publish(1)
    await client.weights.update_weights_from_disk(str(models["old"]))
    await client.weights.update_weight_version("default")
    client.weights.serve_adapter(Adapter("of-another-life", "1"))
    (row,) = await pool.generate(IDS, {"max_new_tokens": 3})
    assert row.weight_version == "1" and len(recovered) == 1
    assert await pool.replicas[0].input_logprobs(IDS) == pytest.approx(
        expected_logprobs(adapted.model), abs=1e-5
    )
    await publisher.aclose()
    await client.aclose()


@with_trio
async def test_an_adapter_that_does_not_fit(
    sglang_url: str, adapted: Any, models: Any, tmp_path: Path
) -> None:
    """Goal: what the engine says of an adapter it cannot take is the error; it is left paused."""
    larger = lora_backend(models["new"], tmp_path, rank=LORA.rank + 1)
    async with SGLangEngine(sglang_url, timeout_s=200) as engine:
        with pytest.raises(
            WeightSyncError, match=r"version 9 failed at 1 of 1 engines: .*rank 4 is incompatible"
        ):
            await delivery_of("lora", larger, tmp_path / "larger").deliver([engine], "9")
        await publisher_of(
            adapted, [engine], delivery_of("lora", adapted, tmp_path / "fitting")
        ).publish(10)


@with_trio
async def test_a_hanging_receiver_of_a_broadcast(
    sglang_url: str, backend: Any, tmp_path: Path
) -> None:
    """Goal: a collective that an engine does not join is given up in time, as that engine's failure, and the next sync
    makes a new group."""
    change(backend, seed=3)
    async with SGLangEngine(sglang_url, timeout_s=200) as engine:
        delivery = delivery_of("broadcast", backend, tmp_path)
        await delivery.deliver([engine], "20")
        delivery._channel._timeout_s = 2.0  # of the one that hangs
        real = engine.weights.update_weights_from_distributed

        async def never(*arguments: Any, **options: Any) -> None:
            await anyio.sleep_forever()

        engine.weights.update_weights_from_distributed = never  # type: ignore[method-assign]
        with (
            anyio.fail_after(100),
            pytest.raises(WeightSyncError, match="not over after 2 s") as raised,
        ):
            await delivery.deliver([engine], "21")
        assert isinstance(raised.value.__cause__, EngineLost)
        engine.weights.update_weights_from_distributed = real  # type: ignore[method-assign]
        delivery._channel._timeout_s = 120.0
        await publisher_of(backend, [engine], delivery).publish(22)
        await delivery.aclose([engine])


def engine_process(model: Path, port: int) -> tuple[subprocess.Popen[str], str]:
    process = start(embedded_argv(model, port))
    await_health(f"http://127.0.0.1:{port}", process)
    return process, f"http://127.0.0.1:{port}"


def test_the_models_differ(models: dict[str, Path]) -> None:
    """Goal: the tests above cannot pass with the old weights."""
    found = [
        expected_logprobs(AutoModelForCausalLM.from_pretrained(path)) for path in models.values()
    ]
    assert max(abs(a - b) for a, b in zip(*found, strict=True)) > 0.1
