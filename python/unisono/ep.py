"""Expert parallelism: tokens go to the ranks that own their experts, and results come back.

A `Buffer` is made over a communicator, exchanged once by all ranks, and then used in either of two modes.

*Throughput* (prefill, training): `dispatch` sends each token once to every rank that has one of its experts; rows arrive ordered by source
rank, then by token. `combine` adds up what came of each token. `dispatch_cached` repeats a dispatch by its handle; so the backward pass of a
dispatch is a combine, and that of a combine a cached dispatch.

*Low latency* (decode): `low_latency_dispatch` gives a block of rows for each local expert, cast to 8 bits on the way if asked for, and
`low_latency_combine` the weighted sum. Both can be split into a sending and a receiving half.

    import torch, unisono

    with unisono.init() as rank, unisono.ep.Buffer(rank, hidden=64, experts=16) as buffer:
        x, topk_idx = torch.ones(10, 64, dtype=torch.bfloat16), torch.randint(16, (10, 2))
        sent = buffer.dispatch(x, topk_idx)          # rows for the experts of this rank
        y = buffer.combine(sent.x, sent.handle).x    # [10, 64]
"""

from ._native import (
    Buffer,
    Combined,
    Dispatched,
    Handle,
    Layout,
    LowLatencyCombined,
    LowLatencyDispatched,
    LowLatencyHandle,
    SentCombine,
    SentDispatch,
)

__all__ = [
    "Buffer",
    "Combined",
    "Dispatched",
    "Handle",
    "Layout",
    "LowLatencyCombined",
    "LowLatencyDispatched",
    "LowLatencyHandle",
    "SentCombine",
    "SentDispatch",
]
