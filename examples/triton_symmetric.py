"""A kernel of Triton that reaches the memory of all GPUs: an all-reduce of one's own, checked against the library's.

    unisono run -n 2 -- python examples/triton_symmetric.py      # or torchrun --nproc-per-node 2

Each rank has a symmetric buffer in the memory of its GPU. `memory.addresses` says where this rank's GPU finds the buffer of every rank; a kernel
turns these numbers into pointers, reads what all ranks have and adds it up in the order of ranks. `memory.barrier()` before the kernel says that all
ranks have filled theirs, the one behind it that all have read. Needs torch, Triton and a GPU for each rank.
"""

import os

import torch
import triton
import triton.language as tl

import unisono


@triton.jit
def sum_of_all(addresses, out, count, ranks: tl.constexpr, block: tl.constexpr):
    """Adds `count` floats of every rank; a program for each `block` of them."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    is_there = at < count
    total = tl.zeros((block,), tl.float32)
    for rank in tl.static_range(ranks):
        theirs = tl.load(addresses + rank).to(tl.pointer_type(tl.float32))
        # What peers wrote must come from them, not from a cache.
        value = tl.load(theirs + at, mask=is_there, other=0.0, volatile=True)
        total = value if rank == 0 else total + value
    tl.store(out + at, total, mask=is_there)


def main() -> None:
    ordinal = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    torch.cuda.set_device(ordinal)
    with unisono.init(device=ordinal, order="rank") as rank:
        count = 1 << 20
        memory = rank.symmetric_memory(count, torch.float32)
        mine = torch.from_dlpack(memory.local)
        addresses = torch.tensor(memory.addresses, dtype=torch.int64, device="cuda")
        out = torch.empty(count, device="cuda")
        block = 1024
        for step in range(3):
            mine.copy_(torch.randn(count, device="cuda", generator=torch.Generator("cuda").manual_seed(step * 100 + rank.rank)))
            expected = rank.all_reduce(mine.clone())
            memory.barrier()
            sum_of_all[(triton.cdiv(count, block),)](addresses, out, count, ranks=rank.world_size, block=block)
            memory.barrier()
            assert torch.equal(out, expected), f"step {step}: {(out - expected).abs().max()}"
        torch.cuda.synchronize()
        del mine
        memory.close()
        print(f"rank {rank.rank}: the sums of {rank.world_size} ranks are those of all_reduce, bit for bit")


if __name__ == "__main__":
    main()
