"""Try a host in one of its environments before a stage starts there, in seconds. The supervisor runs it; by hand:

    .venv/bin/python -m rollouts.training.smoke trainer --device cuda
    torchrun … -m rollouts.training.smoke trainer --device cuda --store NEW_FILE
    <engine's environment>/bin/python -m rollouts.training.smoke engine --device cuda --cards 2 \
        --module sglang.launch_server --compilers ninja nvcc c++ Python.h

A part that fails ends it with one `error:` line, which names build, driver and device. A CPU runs the same parts, but
for the variable-length kernel.
"""

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rollouts.training import compilers
from rollouts.training.nvidia_driver import driver_version

COLLECTIVE_TIMEOUT_S = 60.0
_CARD = "Look at the card (`nvidia-smi`, `NVRM: Xid` in `dmesg`), or take another"
_HOST = "Try another host, or another build in host.torch_build"
_BUILD = "Remove the environment there, so that it is made anew; or name a build that fits in host.torch_build"
_LOCK = "The environment does not fit this host: check engine.requirements_file, the driver and the host's libraries"


class SmokeError(RuntimeError):
    """A part failed. The message names it, the build, the driver and the device."""


class SmokeReport:
    """The parts, one after another, timed. Where `path` is given, how far they are is there, for who waits."""

    def __init__(self, device: str, path: Path | None = None) -> None:
        self.where = f"device {device}, {driver_version()}"
        self.parts: dict[str, float] = {}
        self._path = path

    @contextlib.contextmanager
    def part(self, name: str, fix: str) -> Iterator[None]:
        """Run a block as a part. What it raises of torch's errors, or of the system's, becomes a SmokeError."""
        started = time.perf_counter()
        print(f"smoke test: {name}", flush=True)
        self._write(name)
        try:
            yield
        except compilers.CompilerError as error:
            raise SmokeError(f"{name}: {error} ({self.where})") from error
        except ValueError as error:
            # a DeviceError: it names build, driver and device, and has its fix
            raise SmokeError(f"{name}: {error}") from error
        except (ImportError, OSError, RuntimeError) as error:
            said = str(error).strip() or type(error).__name__
            raise SmokeError(f"{name}: {said}, on {self.where}. {fix}.") from error
        self.parts[name] = round(time.perf_counter() - started, 3)
        self._write("")

    def _write(self, doing: str) -> None:
        if self._path is not None:
            temporary = self._path.with_name(f"{self._path.name}.new")
            temporary.write_text(json.dumps({"doing": doing, "parts": self.parts}))
            temporary.replace(self._path)


def try_trainer(report: SmokeReport, device_type: str, *, store: Path | None) -> None:
    """Run the parts of a trainer's rank on its device. Raises SmokeError."""
    fix = _CARD if device_type == "cuda" else _HOST
    with report.part("torch", _BUILD):
        from rollouts.training import device_checks, distributed
        from rollouts.training.devices import describe_build

        report.where = (
            f"device {device_type}:{os.environ.get('LOCAL_RANK', '0')} with {describe_build()}"
        )
        device = distributed.initialize(
            device_type, timeout_s=COLLECTIVE_TIMEOUT_S, store_file=store
        )
        report.where = f"device {device_checks.name_of(device)} with {describe_build()}"
    with report.part("bf16 product", fix):
        device_checks.check_product(device)
    with report.part("attention", fix):
        for head_dim in device_checks.HEAD_DIMS:
            device_checks.check_attention(device, head_dim, packed=device_type == "cuda")
    with report.part(f"all-reduce over {distributed.world_size()} ranks", fix):
        device_checks.check_all_reduce(device)
        distributed.shutdown()


def try_cards(report: SmokeReport, device_type: str, *, cards: int) -> None:
    """Run the parts of an engine on its devices: its own torch sees each, and computes there. Raises SmokeError."""
    with report.part("torch", _BUILD):
        from rollouts.training import device_checks, distributed
        from rollouts.training.devices import describe_build

        report.where = f"device {device_type} with {describe_build()}"
        devices = [distributed.local_device(device_type, index) for index in range(cards)]
    for device in devices:
        report.where = f"device {device_checks.name_of(device)} with {describe_build()}"
        with report.part(f"bf16 product on {device}", _CARD if device_type == "cuda" else _HOST):
            device_checks.check_product(device)


def try_modules(report: SmokeReport, names: list[str]) -> None:
    """Import what a server starts with. Raises SmokeError."""
    with report.part("engine package", _LOCK):
        for name in names:
            try:
                importlib.import_module(name)
            except (ImportError, OSError, RuntimeError) as error:
                raise RuntimeError(
                    f"{name} cannot be imported: {type(error).__name__}: {error}"
                ) from error


def try_compilers(report: SmokeReport, names: list[str]) -> None:
    """Find what kernels are compiled with. Raises SmokeError."""
    with report.part("compilers", ""):
        for name in names:
            compilers.require(name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Try this host before anything trains or serves on it."
    )
    parser.add_argument("who", choices=("trainer", "engine"))
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument(
        "--store", type=Path, help="a file that does not exist, where the trainer's ranks meet"
    )
    parser.add_argument(
        "--cards", type=int, default=1, help="how many devices an engine has to see"
    )
    parser.add_argument("--module", action="append", default=[], help="what has to import")
    parser.add_argument("--compilers", nargs="*", default=[], choices=compilers.NAMES)
    parser.add_argument("--report", type=Path, help="where rank 0 writes how far it is")
    arguments = parser.parse_args(argv)
    is_first = os.environ.get("RANK", "0") == "0"
    report = SmokeReport(arguments.device, arguments.report if is_first else None)
    try:
        if arguments.who == "trainer":
            try_trainer(report, arguments.device, store=arguments.store)
        else:
            try_cards(report, arguments.device, cards=arguments.cards)
        if arguments.module:
            try_modules(report, arguments.module)
        if arguments.compilers:
            try_compilers(report, arguments.compilers)
    except SmokeError as error:
        print(f"error: smoke test: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if is_first:
        print(f"smoke test: passed, {json.dumps(report.parts)}", flush=True)
    return 0


if __name__ == "__main__":
    code = main()
    if code:
        sys.stderr.flush()
        os._exit(code)  # a broken communicator may hang where Python takes it apart
    sys.exit(code)
