"""How fast weights move into an engine, by kind and size, beside a plain copy of the same bytes, which is the limit.

`python benchmarks/weight_sync.py [--sglang-python PYTHON]` prints, for a random Qwen2, seconds, GB/s and the ratio to
the copy: of each kind of delivery (pause → delivery → flush → version → continue), and in the last column the seconds
of a whole sync with its proof by log-probs; beside it what a sync was without any of that: `save_pretrained`, then
/update_weights_from_disk. The engine is the real SGLang on a CPU where its interpreter is given (or in
ROLLOUTS_TEST_SGLANG_PYTHON), else the embedded one, which has no broadcast. fp32, one thread each: at least two cores.
Kind "lora" sends an adapter of rank 16 of all linear layers alone, to an SGLang started for that: GB/s are its bytes.

The copy is `destination.copy_(source)`, tensor by tensor, memory that both have touched before. "copy to a file" writes
the same bytes to a new file in /dev/shm. Medians of `--repeats`, after three that are not counted (the first two make
what later ones reuse).
"""

import argparse
import dataclasses
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from base_config import LoraConfig  # noqa: E402
from rollouts.training.backends.pytorch import PyTorchTrainingBackend  # noqa: E402
from rollouts.training.inference.pool.engine_pool import EnginePool  # noqa: E402
from rollouts.training.lora import LoraSettings, apply_lora  # noqa: E402
from rollouts.training.rl_losses import grpo_loss  # noqa: E402
from rollouts.training.weight_sync import SGLangEngine  # noqa: E402
from rollouts.training.weights.channel.process_group import ProcessGroupChannel  # noqa: E402
from rollouts.training.weights.channel.shared_memory import SharedMemoryChannel  # noqa: E402
from rollouts.training.weights.deliver.adapter import AdapterDelivery  # noqa: E402
from rollouts.training.weights.deliver.buckets import BucketDelivery  # noqa: E402
from rollouts.training.weights.deliver.disk import DiskDelivery  # noqa: E402
from rollouts.training.weights.publish import WeightPublisher  # noqa: E402
from tests.engines.contract_servers import running  # noqa: E402
from tests.engines.serving import make_tokenizer  # noqa: E402

SGLANG_PYTHON = "ROLLOUTS_TEST_SGLANG_PYTHON"
SHARED_MEMORY = Path("/dev/shm")
SIZES = {  # hidden size, layers, vocabulary: about so many bytes in fp32
    "19MB": (256, 4, 4096),
    "250MB": (768, 6, 16384),
    "1GB": (1536, 8, 16384),
}
WARM_UP = 3
KINDS = ("disk", "tmpfs", "tensor", "broadcast", "lora")
LORA = LoraConfig(rank=16, alpha=32.0, dropout=0.0, target_modules="all-linear", init_seed=0)


def make_model(size: str, directory: Path) -> Any:
    width, layers, vocabulary = SIZES[size]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)  # SGLang warms up with text
    return model


def median_s(work: Callable[[], object], repeats: int) -> float:
    work()
    return statistics.median(_timed(work) for _ in range(repeats))


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


async def median_async_s(work: Callable[[int], Awaitable[object]], repeats: int) -> float:
    seconds = []
    for index in range(WARM_UP + repeats):
        start = time.perf_counter()
        await work(index)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])


def copy_s(model: Any, repeats: int) -> float:
    sources = [parameter.detach() for parameter in model.parameters()]
    destinations = [torch.zeros_like(source) for source in sources]

    def copy() -> None:
        for destination, source in zip(destinations, sources, strict=True):
            destination.copy_(source)

    return median_s(copy, repeats)


def copy_to_file_s(model: Any, repeats: int) -> float:
    sources = [parameter.detach() for parameter in model.parameters()]
    file = SHARED_MEMORY / f"rollouts-benchmark-{os.getpid()}"

    def copy() -> None:
        file.unlink(missing_ok=True)
        with file.open("wb", buffering=0) as out:
            for source in sources:
                out.write(memoryview(source.view(-1).numpy()).cast("B"))

    try:
        return median_s(copy, repeats)
    finally:
        file.unlink(missing_ok=True)


def delivery_of(kind: str, backend: Any, directory: Path, bucket_mib: int) -> Any:
    place = SHARED_MEMORY / f"rollouts-benchmark-{os.getpid()}-weights"
    if kind == "lora":
        return AdapterDelivery(backend, place, temporary=True)
    if kind in ("disk", "tmpfs"):
        place = directory / "weights" if kind == "disk" else place
        return DiskDelivery(backend, place, temporary=True)
    channel: Any = (
        SharedMemoryChannel()
        if kind == "tensor"
        else ProcessGroupChannel(device_type="cpu", timeout_s=120.0)
    )
    return BucketDelivery(backend, channel, dtype=None, bucket_bytes=bucket_mib * 2**20)


async def sync_s(
    kind: str, backend: Any, url: str, directory: Path, options: argparse.Namespace
) -> tuple[float, float]:
    """Of the delivery alone, and of the whole sync."""
    async with SGLangEngine(url, timeout_s=300) as engine:
        delivery = delivery_of(kind, backend, directory, options.bucket_mib)
        publisher = WeightPublisher(backend, EnginePool.of([engine]), delivery, dtype="float32")
        try:
            alone = await median_async_s(
                lambda index: delivery.deliver([engine], str(index)), options.repeats
            )
            return alone, await median_async_s(
                lambda index: publisher.publish(100 + index), options.repeats
            )
        finally:
            await publisher.aclose()


async def plain_s(model: Any, url: str, directory: Path, repeats: int) -> float:
    """save_pretrained and a reload: no pause, no proof."""
    async with SGLangEngine(url, timeout_s=300) as engine:

        async def sync(version: int) -> None:
            path = directory / f"plain_{version % 2}"
            shutil.rmtree(path, ignore_errors=True)
            model.save_pretrained(path)
            await engine.request("POST", "/update_weights_from_disk", {"model_path": str(path)})

        return await median_async_s(sync, repeats)


@contextmanager
def engine_over(kind: str, model: Path, lora: LoraConfig | None = None) -> Iterator[str]:
    with running(kind, model, model, model, lora=lora) as server:
        yield server.url


def adapters_s(directory: Path, options: argparse.Namespace) -> tuple[float, tuple[float, float]]:
    """Gigabytes of an adapter of the model in `directory`, and its `sync_s`."""
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    apply_lora(model, LoraSettings(**dataclasses.asdict(LORA)), base_name=str(directory / "model"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    backend = PyTorchTrainingBackend(model, torch.optim.SGD(trained, lr=0.1), grpo_loss, directory)
    with engine_over("sglang", directory / "model", LORA) as url:
        seconds = anyio.run(sync_s, "lora", backend, url, directory, options)
    return sum(parameter.nbytes for parameter in trained) / 1e9, seconds


def measure(size: str, kind: str, directory: Path, options: argparse.Namespace) -> None:
    model = make_model(size, directory / "model")
    gigabytes = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    limit_s = copy_s(model, options.repeats)
    rows: dict[str, tuple[float, float | None]] = {
        "plain copy in memory": (limit_s, None),
        "copy to a file in /dev/shm": (copy_to_file_s(model, options.repeats), None),
    }
    backend = PyTorchTrainingBackend(
        model, torch.optim.SGD(model.parameters(), lr=0.1), grpo_loss, directory
    )
    with engine_over(kind, directory / "model") as url:
        rows["save_pretrained + reload"] = (
            anyio.run(plain_s, model, url, directory, options.repeats),
            None,
        )
        for name in options.kinds:
            if name != "lora" and (name != "broadcast" or kind == "sglang"):
                rows[name] = anyio.run(sync_s, name, backend, url, directory, options)
    sizes = {}
    if "lora" in options.kinds and kind == "sglang":
        sizes["lora"], rows["lora"] = adapters_s(directory, options)
    print(
        f"\n{gigabytes:.3f} GB in {len(list(model.parameters()))} tensors, engine: {kind}, {options.repeats} repeats"
    )
    print(f"{'':30}{'seconds':>10}{'GB/s':>8}{'x copy':>9}{'with proof':>12}")
    for name, (seconds, whole) in rows.items():
        proven = "" if whole is None else f"{whole:12.3f}"
        sent = sizes.get(name, gigabytes)
        share = "" if sent == gigabytes else f"  ({sent / gigabytes:.2%} of the bytes)"
        print(
            f"{name:30}{seconds:10.3f}{sent / seconds:8.2f}{seconds / limit_s:9.2f}{proven}{share}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=256)
    parser.add_argument(
        "--sglang-python", default=os.environ.get(SGLANG_PYTHON), help="interpreter with SGLang"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.sglang_python:
        os.environ[SGLANG_PYTHON] = options.sglang_python
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as directory:
            measure(
                size, "sglang" if options.sglang_python else "embedded", Path(directory), options
            )


if __name__ == "__main__":
    main()
