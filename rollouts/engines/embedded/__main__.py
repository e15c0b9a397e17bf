"""`python -m rollouts.engines.embedded --model-path DIR --port N`: serve until SIGTERM. See docs/reference/engines.md.

Exit codes: 0 after SIGTERM or SIGINT, 1 when it cannot start or its model thread died (one line on stderr says why),
2 for a bad command line.
"""

import argparse
import dataclasses
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from rollouts.engines.embedded.served_model import Served

STOP_GRACE_S = 2.0


def main() -> int:
    args = _parse(sys.argv[1:])
    if not (Path(args.model_path) / "config.json").is_file():
        found = "has no config.json" if Path(args.model_path).is_dir() else "no such directory"
        return _fail(
            f"--model-path {args.model_path}: {found}; needs a Hugging Face directory with weights"
        )
    try:
        listener = _bind(args.host, args.port)
    except OSError as error:
        return _fail(
            f"cannot listen on {args.host}:{args.port}: {error.strerror}. Set another engine.sglang_port"
        )

    from rollouts.engines.embedded import scheduler
    from rollouts.engines.embedded.mailbox import Mailbox
    from rollouts.engines.embedded.served_model import ServedModelError
    from rollouts.engines.embedded.server import EmbeddedServer
    from rollouts.engines.keys import read_keys
    from rollouts.training import open_files

    open_files.allow_all()  # a connection for each request
    mailbox = Mailbox()
    routes = EmbeddedServer(mailbox, vars(args), read_keys())
    config = uvicorn.Config(
        routes.app(),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
        timeout_keep_alive=600,  # clients keep their connections over a training step
        backlog=2048,
    )
    server = uvicorn.Server(config)
    failure: list[str] = []

    def serve_model() -> None:
        try:
            rows_max, seed = args.max_running_requests, args.random_seed
            scheduler.serve(
                lambda: _load(args), mailbox, rows_max=rows_max, seed=seed, ready=routes.open
            )
        except ServedModelError as error:
            failure.append(str(error))
        except BaseException as error:
            # the process must not outlive its model thread, whatever its error
            failure.append(f"the model thread died: {type(error).__name__}: {error}")
            raise
        finally:
            server.should_exit = True

    thread = threading.Thread(target=serve_model, name="model", daemon=True)
    thread.start()
    # uvicorn shuts down on these signals, then raises them again for the handlers before its own. These do nothing, so
    # we end with 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
    mailbox.stop()
    thread.join(timeout=STOP_GRACE_S)
    return _fail(failure[0]) if failure else 0


def _load(args: argparse.Namespace) -> "Served":
    from rollouts.engines.embedded import served_model
    from rollouts.training.host_memory import keep_freed_memory

    if args.device == "cpu":
        keep_freed_memory()
    served = served_model.load(
        args.model_path,
        dtype=args.dtype,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    if served.device.type == "cuda":
        import torch

        torch.cuda.set_per_process_memory_fraction(args.mem_fraction_static)
    return dataclasses.replace(
        served, context_length=min(served.context_length, args.context_length)
    )


def _bind(host: str, port: int) -> socket.socket:
    """Take the port before the slow imports: a port in use is then reported at once."""
    # With the protocol named, asyncio sets TCP_NODELAY on accepted sockets; without, answers wait 40 ms for an ACK.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def _fail(message: str) -> int:
    print(f"error: embedded engine: {message}", file=sys.stderr, flush=True)
    return 1


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rollouts.engines.embedded",
        description="Serve a Hugging Face directory over the SGLang HTTP subset that RL needs.",
    )
    parser.add_argument(
        "--model-path", required=True, help="directory with config.json and safetensors"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu")
    parser.add_argument(
        "--context-length",
        type=_positive,
        default=1 << 30,
        help="at most what the model was made for",
    )
    parser.add_argument(
        "--max-running-requests", type=_positive, default=64, help="sequences decoded at once"
    )
    parser.add_argument(
        "--mem-fraction-static",
        type=float,
        default=0.9,
        help="of the GPU's memory, for all of the process",
    )
    parser.add_argument(
        "--random-seed", type=int, default=0, help="for requests without sampling_seed"
    )
    parser.add_argument("--trust-remote-code", action="store_true")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: needs >= 1")
    return value


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Python takes seconds to take torch apart, longer with a forward pass under way
    os._exit(status)
