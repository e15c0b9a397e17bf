"""SGLang's server for a machine without a GPU: python -m rollouts.engines.sglang.cpu_launcher <the server's flags>.

The parts that SGLang 0.5.21 lacks there are put in place at module level, since the server's processes import this file
again. The environment must have `cpu_stubs` on its PYTHONPATH and SGLANG_USE_CPU_ENGINE=1. The rest is launcher.py.
"""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# small functions are compiled on first use, with a C++ compiler
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch

_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")


def _torchvision_without_cuda() -> None:
    """Let torchvision be imported beside a CPU build of torch.

    The wheel of the public index is a CUDA build. Beside a CUDA build of torch its library loads, GPU or not. Beside a
    CPU build it does not load, and the import of torchvision then stops at two operators that the library would define.
    """
    found = importlib.util.find_spec("torchvision")
    for directory in (found and found.submodule_search_locations) or ():
        for library in Path(directory).glob("_C*.so"):
            with contextlib.suppress(OSError):
                torch.ops.load_library(str(library))
                return
    for name in ("nms", "qnms"):
        _TORCHVISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _seeds_without_a_gpu() -> None:
    """Let --enable-deterministic-inference start on a CPU: without it requests' seeds are ignored.

    It turns on a sampler that uses seeds, which works here (its hash is in `cpu_stubs`). torch's attention, over one
    sequence after another, needs no change. The batch-invariant matrix kernels are for GPUs, and left out.
    """
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups import choices

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = lambda: None


class _Unpinned(ModuleType):
    """torch for modules that make pinned tensors, with plain memory instead: nothing is copied to a GPU from it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def tensor(self, *arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return torch.tensor(*arguments, **options)

    def zeros(self, *arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return torch.zeros(*arguments, **options)


def _adapters_without_a_gpu() -> None:
    """Let --enable-lora start on a CPU: SGLang's torch backend computes there, but pins its tensors.

    Without a GPU torch cannot pin memory: a RuntimeError as the first layer is wrapped.
    """
    from sglang.srt.lora import layers
    from sglang.srt.lora.backend import torch_backend

    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    layers.torch = torch_backend.torch = _Unpinned("torch")


_torchvision_without_cuda()
# also when started by this file's path
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from rollouts.training.stores import bind_all_stores  # noqa: E402

bind_all_stores()  # before SGLang is imported
_seeds_without_a_gpu()
if "--enable-lora" in sys.argv:
    _adapters_without_a_gpu()

from rollouts.training.weights.wire import keep_mappings  # noqa: E402

keep_mappings()  # SGLang would map a bucket of weights anew each time


if __name__ == "__main__":
    from rollouts.engines.sglang.launcher import main

    main(sys.argv[1:])
