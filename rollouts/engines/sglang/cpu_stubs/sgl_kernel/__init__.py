"""A stub of SGLang's kernel package, which needs a GPU: one operator, and names that are never called."""

from typing import Any, NoReturn

import torch

_MASK = 0xFFFFFFFF


def _mix(state: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    block = _rotate(block * 0xCC9E2D51 & _MASK, 15) * 0x1B873593 & _MASK
    return _rotate(state ^ block, 13) * 5 + 0xE6546B64 & _MASK


def _rotate(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x << bits | x >> 32 - bits) & _MASK


def murmur_hash32(
    seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    """Return MurmurHash3 (32 bits) of (seed [n], 64 bits; position [n]; column [m]) as [n, m] uint32.

    It is the randomness of seeded sampling, with the bits of `sglang.kernels.ops.sampling.murmur_hash` on a GPU.
    Computed in int64: products wrap at 2**64, which leaves their low 32 bits right.
    """
    seed, positions, columns = (x.to(torch.int64) for x in (seed, positions, col_indices))
    state = _mix(torch.zeros_like(seed), seed & _MASK)
    state = _mix(state, seed >> 32 & _MASK)
    state = _mix(state, positions & _MASK)
    state = _mix(state[:, None], columns[None, :] & _MASK) ^ 16  # its length in bytes
    state = (state ^ state >> 16) * 0x85EBCA6B & _MASK
    state = (state ^ state >> 13) * 0xC2B2AE35 & _MASK
    return (state ^ state >> 16).to(torch.uint32)


_LIBRARY = torch.library.Library("sgl_kernel", "FRAGMENT")
_LIBRARY.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_LIBRARY.impl("murmur_hash32_cpu", murmur_hash32, "CompositeExplicitAutograd")


def _missing(name: str) -> Any:
    def call(*_arguments: Any, **_keywords: Any) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name}: this machine runs SGLang without its kernel package"
        )

    return call


copy_all_layer_kv_cache_cpu = _missing("copy_all_layer_kv_cache_cpu")
assign_req_to_token_pool_cpu = _missing("assign_req_to_token_pool_cpu")
assign_extend_cache_locs_cpu = _missing("assign_extend_cache_locs_cpu")
build_tree_kernel_efficient_cpu = _missing("build_tree_kernel_efficient_cpu")
verify_tree_greedy_cpu = _missing("verify_tree_greedy_cpu")
fill_accept_out_cache_loc_cpu = _missing("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _missing("fill_bonus_tokens_cpu")
