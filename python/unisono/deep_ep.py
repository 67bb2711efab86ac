"""The interface of expert parallelism that inference engines call under the name `deep_ep`, on tensors of torch, over `unisono.ep`.

An engine that imports `deep_ep` finds this module if the package `unisono-deep-ep` is installed, or after `unisono.deep_ep.install()`. It works
on any number of ranks of one host, on tensors of the CPU and of GPUs, and needs neither NVSHMEM nor a network card.

Shapes: T tokens of H elements, K experts of a token, E experts, R ranks, L = E / R experts of a rank, N rows that were received. Every rank makes
the same calls in the same order, with the same H, K, E and options; numbers of tokens are each rank's own. Errors are those of `unisono.ep`.
Memory is shared when a shape (H and E, in low-latency mode the number of tokens too) is first used; so the first call takes longer, and any number
of shapes are there at once. Arguments that mean nothing here (sizes of chunks and queues, network settings) are accepted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

try:
    import torch
    import torch.distributed as dist
except ImportError as missing:
    raise ImportError("unisono.deep_ep works on tensors of torch, which is not here: pip install torch") from missing

from . import Communicator, StoreServer, UniqueId, ep

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "install", "topk_idx_t"]

topk_idx_t = torch.int64

# What a call of `ep.Buffer` takes if nothing else is said.
MULTIPROCESSORS = 12
# In what ranks tell each other: no single rank.
EVERYBODY = -1

Tensor = torch.Tensor
Tokens = Tensor | tuple[Tensor, Tensor]


def install() -> None:
    """Makes `import deep_ep` give this module, in this process.

    >>> import unisono.deep_ep
    >>> unisono.deep_ep.install()
    >>> import deep_ep
    >>> deep_ep.Buffer is unisono.deep_ep.Buffer
    True
    """
    sys.modules["deep_ep"] = sys.modules[__name__]


class Config:
    """How a throughput call is carried out. `num_sms` is the most multiprocessors; sizes of chunks mean nothing here.

    >>> from unisono.deep_ep import Config
    >>> Config(24).num_sms
    24
    """

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        self.num_sms = num_sms
        self.num_max_nvl_chunked_send_tokens = num_max_nvl_chunked_send_tokens
        self.num_max_nvl_chunked_recv_tokens = num_max_nvl_chunked_recv_tokens
        self.num_max_rdma_chunked_send_tokens = num_max_rdma_chunked_send_tokens
        self.num_max_rdma_chunked_recv_tokens = num_max_rdma_chunked_recv_tokens

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes that each of `num_ranks` ranks needs for tokens of so many bytes.

        >>> from unisono.deep_ep import Config
        >>> Config().get_nvl_buffer_size_hint(7168 * 2, 8) > 7168 * 2
        True
        """
        return ep.Buffer.bytes(num_ranks, _up_to(hidden_bytes, 16) // 2, num_ranks)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """The same between hosts: 0, as all ranks are on one.

        >>> from unisono.deep_ep import Config
        >>> Config().get_rdma_buffer_size_hint(7168 * 2, 8)
        0
        """
        return 0


class EventHandle:
    """A point in a stream of a GPU: what the current stream (or `stream`) holds now. Without a GPU it is always passed.

    >>> from unisono.deep_ep import EventHandle
    >>> EventHandle().current_stream_wait()
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self.event = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.event = (stream or torch.cuda.current_stream()).record_event()

    def current_stream_wait(self) -> None:
        """Makes the current stream wait for it. Returns at once.

        >>> from unisono.deep_ep import EventHandle
        >>> EventHandle().current_stream_wait()
        """
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class EventOverlap:
    """An event that a call gives, or takes as `previous_event`; as a context manager, one that is waited for when the block ends.
    `extra_tensors` are kept alive with it.

    >>> from unisono.deep_ep import Buffer
    >>> with Buffer.capture():
    ...     pass  # work beside the call
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Tensor, ...] | None = None) -> None:
        self.event, self.extra_tensors = event, extra_tensors

    def current_stream_wait(self) -> None:
        """Makes the current stream wait for the event, which there must be.

        >>> from unisono.deep_ep import EventHandle, EventOverlap
        >>> EventOverlap(EventHandle()).current_stream_wait()
        """
        if self.event is None:
            raise ValueError("current_stream_wait: expected an event, got none: the call was made without async_finish")
        self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None) -> None:
        if self.event is not None:
            self.event.current_stream_wait()


class Buffer:
    """Moves tokens between the ranks of `group` (a process group of torch) or of `comm` (a communicator of mpi4py). Every rank makes one.

    With `enable_shrink` a rank that dies, or is silent past the deadline, is left out instead of failing the others; if it lives, all ranks together
    take it in again by `low_latency_clean_mask_buffer()`. A shape that is first used meanwhile waits for it. With `explicitly_destroy` the buffer is
    ended by `destroy()`, else with the object. `device` is this module's own: the GPU to work on, or "cpu"; by default the current GPU of torch
    if there is one. Attributes: `rank`, `group_size`, `group`, `num_nvl_bytes`, `num_rdma_bytes`, `low_latency_mode`, `runtime`.

    Raises `ValueError` without a group and a communicator, `SeveralHostsError` if the ranks are on several hosts, and what
    `Communicator.from_process_group` raises.

    >>> import torch, torch.distributed as dist
    >>> from unisono.deep_ep import Buffer
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> buffer = Buffer(dist.group.WORLD, device="cpu", explicitly_destroy=True)
    >>> x, topk_idx = torch.ones(3, 64, dtype=torch.bfloat16), torch.tensor([[0, 1], [1, -1], [-1, -1]])
    >>> to_rank, _, to_expert, is_in_rank, _ = buffer.get_dispatch_layout(topk_idx, 2)
    >>> recv_x, recv_topk_idx, _, counts, handle, _ = buffer.dispatch(
    ...     x, num_tokens_per_rank=to_rank, is_token_in_rank=is_in_rank, num_tokens_per_expert=to_expert, topk_idx=topk_idx)
    >>> recv_x.shape, counts, buffer.combine(recv_x, handle)[0][:, 0].tolist()
    (torch.Size([2, 64]), [1, 2], [1.0, 1.0, 0.0])
    >>> between = buffer.internode_dispatch(x, handle)  # the same, as all ranks are on one host
    >>> buffer.internode_combine(between[0], handle)[0][:, 0].tolist()
    [1.0, 1.0, 0.0]

    In low-latency mode:

    >>> buffer.clean_low_latency_buffer(4, 64, 2)
    >>> recv, count, handle, _, hook = buffer.low_latency_dispatch(x, topk_idx, 4, 2, use_fp8=False, return_recv_hook=True)
    >>> hook()  # sent before, received now
    >>> combined, _, _ = buffer.low_latency_combine(recv, topk_idx, torch.full((3, 2), 0.5), handle)
    >>> recv.shape, count.tolist(), combined[:, 0].tolist()
    (torch.Size([2, 4, 64]), [1, 2], [1.0, 0.5, 0.0])
    >>> buffer.get_next_low_latency_combine_buffer(handle)[:] = recv * 2
    >>> buffer.low_latency_combine(recv, topk_idx, torch.full((3, 2), 0.5), handle, zero_copy=True)[0][:, 0].tolist()
    [2.0, 1.0, 0.0]
    >>> mask = torch.empty(1, dtype=torch.int32)
    >>> buffer.low_latency_query_mask_buffer(mask)
    >>> buffer.low_latency_update_mask_buffer(0, mask=False)  # it was not left out
    >>> buffer.low_latency_clean_mask_buffer()
    >>> mask.tolist(), buffer.get_local_buffer_tensor(torch.int8).shape, buffer.get_comm_stream() is not None
    ([0], torch.Size([0]), True)
    >>> buffer.destroy()
    >>> dist.destroy_process_group()
    """

    num_sms: int = 20

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        device: int | str | torch.device | None = None,
    ) -> None:
        if device is None and torch.cuda.is_available():
            device = torch.cuda.current_device()
        self._device = None
        if device is not None and str(device) != "cpu":
            self._device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        self._communicator, self._server = _meet(group, comm, {} if self._device is None else {"device": str(self._device)})
        self.rank, self.group_size, self.group = self._communicator.rank, self._communicator.world_size, group
        self.num_nvl_bytes, self.num_rdma_bytes, self.low_latency_mode = num_nvl_bytes, num_rdma_bytes, low_latency_mode
        self.explicitly_destroy, self.enable_shrink = explicitly_destroy, enable_shrink
        self.runtime = Runtime(-1 if self._device is None else self._device.index or 0)
        self._buffers: dict[tuple[int, int, int | None], ep.Buffer] = {}
        self._stream: torch.cuda.Stream | None = None
        self._local: Tensor | None = None

    def destroy(self) -> None:
        """Ends the buffer, with all ranks. Only with `explicitly_destroy`."""
        if not self.explicitly_destroy:
            raise ValueError("destroy: expected a Buffer that was made with explicitly_destroy=True, got one without; it ends with the object")
        self.runtime.is_open = False
        self._buffers.clear()
        self._communicator.destroy()

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether the current GPU is a Hopper or newer.

        >>> from unisono.deep_ep import Buffer
        >>> isinstance(Buffer.is_sm90_compiled(), bool)
        True
        """
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Sets the number of multiprocessors that configurations name from now on: an even one.

        >>> from unisono.deep_ep import Buffer
        >>> Buffer.set_num_sms(20)
        """
        if new_num_sms <= 0 or new_num_sms % 2:
            raise ValueError(f"set_num_sms: expected an even number above 0, got {new_num_sms}")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event behind what the current stream holds.

        >>> from unisono.deep_ep import Buffer
        >>> Buffer.capture().current_stream_wait()
        """
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int) -> int:
        """Bytes that a rank needs for low-latency calls of these sizes.

        >>> from unisono.deep_ep import Buffer
        >>> Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 288) > 128 * 7168 * 2
        True
        """
        return ep.Buffer.bytes(num_ranks, hidden, num_experts, capacity=num_max_dispatch_tokens_per_rank, low_latency=True)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """A configuration for a dispatch, for any number of ranks.

        >>> from unisono.deep_ep import Buffer
        >>> Buffer.get_dispatch_config(3).num_sms == Buffer.num_sms
        True
        """
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """A configuration for a combine, for any number of ranks.

        >>> from unisono.deep_ep import Buffer
        >>> Buffer.get_combine_config(3).num_sms == Buffer.num_sms
        True
        """
        return Config(Buffer.num_sms)

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The stream in which calls with `async_finish` run. Without a GPU it is torch's stand-in, in which all is done at once."""
        if self._device is None:
            return torch.cpu.Stream()  # type: ignore[return-value]
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return self._stream

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """Memory of this rank as large as was asked for (`num_rdma_bytes` with `use_rdma_buffer`, else `num_nvl_bytes`), from byte `offset` on, of
        `dtype`, and of shape `size` if that is given. It is always the same; calls do not use it, they have memory of their own."""
        wanted = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        if self._local is None or self._local.numel() < wanted:
            self._local = torch.zeros(max(self.num_rdma_bytes, self.num_nvl_bytes), dtype=torch.uint8, device=self._device)
        elements = (wanted - offset) // dtype.itemsize
        tensor = self._local[offset : offset + elements * dtype.itemsize].view(dtype)
        if size is None:
            return tensor
        if tensor.numel() < size.numel():
            raise ValueError(f"get_local_buffer_tensor: expected at most {tensor.numel()} elements behind the offset, got {size.numel()}")
        return tensor[: size.numel()].view(size)

    # Throughput.

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """Where tokens go: `(num_tokens_per_rank, None, num_tokens_per_expert, is_token_in_rank, event)`, which are int32 `[R]`, int32 `[E]` and
        bool `[T, R]`. `topk_idx` is int64 `[T, K]`, each an expert, or −1, which selects nothing. Local: nobody is told."""
        stream = self._begin(previous_event, async_finish)
        found = next((buffer for key, buffer in self._buffers.items() if key[1] == num_experts), None)
        if found is not None:
            layout = found.layout(topk_idx, stream=stream)
            to_rank, to_expert, is_in_rank = layout.tokens_per_rank, layout.tokens_per_expert, layout.is_token_in_rank
        else:
            found = layout = None
            with torch.cuda.stream(stream):
                to_rank, to_expert, is_in_rank = _layout(topk_idx, num_experts, self.group_size)
        # For a dispatch that is given nothing else.
        is_in_rank._unisono_layout = (found, layout, topk_idx)
        return to_rank, None, to_expert, is_in_rank, self._end(stream, async_finish)

    def dispatch(
        self,
        x: Tokens,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tokens, Tensor | None, Tensor | None, list[int] | None, tuple[Any, ...] | None, EventOverlap]:
        """Sends tokens to the ranks of their experts: `(recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle, event)`.

        `x` is bfloat16 `[T, H]`, or a pair of float8_e4m3fn `[T, H]` and scales, float32 or int32 `[T, n]` of any strides. The next arguments are what
        `get_dispatch_layout` gave; `topk_idx` int64 `[T, K]` and `topk_weights` float32 `[T, K]` travel along if they are given.

        `recv_x` is like `x` with N rows, by source rank and then by the token's index there; `recv_topk_idx` int64 `[N, K]` counts the experts of this
        rank, −1 where one lives elsewhere, and `recv_topk_weights` is 0 there; the list has the selections of each expert of this rank, rounded up to
        `expert_alignment`. With `num_worst_tokens` outputs have so many rows, the list is empty, rows behind the last have index −1, and nobody waits
        for their number. `handle[0]` is int32 `[R, R]`, at `[i][r]` the tokens of ranks 0 to i for rank r; `handle[3]` int32 `[N]` the token's index
        at its source; `handle[4]` is `is_token_in_rank`.

        With a `handle` of an earlier dispatch other tokens go the same way, and only `recv_x` and the event are not None.

        The current stream waits for the call, or with `async_finish` only `event` does; the call waits for `previous_event`, or for the current
        stream."""
        tokens, scales = x if isinstance(x, tuple) else (x, None)
        stream, sms = self._begin(previous_event, async_finish), _multiprocessors(config)
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise ValueError("dispatch: expected no topk_idx and topk_weights beside a handle, got some; the handle says where tokens go")
            buffer, native = handle[1]
            recv_x, recv_scales = buffer.dispatch_cached(tokens, native, scales=scales, multiprocessors=sms, stream=stream)
            recv = recv_x if scales is None else (recv_x, recv_scales)
            return recv, None, None, None, None, self._end(stream, async_finish)
        if is_token_in_rank is None or num_tokens_per_expert is None:
            raise ValueError("dispatch: expected a handle, or what get_dispatch_layout gives, got neither")
        buffer = self._buffer(tokens.size(1), num_tokens_per_expert.size(0))
        owner, layout, selections = getattr(is_token_in_rank, "_unisono_layout", (None, None, None))
        if owner is not buffer:
            layout = None
        if layout is None and topk_idx is None:
            if selections is not None:
                layout = buffer.layout(selections, stream=stream)
            else:
                layout = buffer.layout_of_ranks(is_token_in_rank, num_tokens_per_expert, stream=stream)
        sent = buffer.dispatch(
            tokens,
            topk_idx,
            topk_weights=topk_weights,
            scales=scales,
            layout=layout,
            expert_alignment=expert_alignment,
            worst_tokens=num_worst_tokens or None,
            multiprocessors=sms,
            stream=stream,
        )
        route = (sent.handle.rank_prefix, (buffer, sent.handle), None, sent.handle.source_tokens, is_token_in_rank, None)
        recv = sent.x if scales is None else (sent.x, sent.scales)
        return recv, sent.topk_idx, sent.topk_weights, sent.tokens_per_expert, route, self._end(stream, async_finish)

    def combine(
        self,
        x: Tensor,
        handle: tuple[Any, ...],
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Brings results back: `(x, topk_weights or None, event)`. `x` is bfloat16 `[N, H]`, a row for each that the dispatch of `handle` brought;
        what comes is `[T, H]`, the unweighted sum over the ranks that a token went to, in the order of ranks, plus `bias` (`[T, H]`, or a pair of
        them), made in float32 and rounded once. `topk_weights`, float32 `[N, K]`, return and are added likewise. Streams as in `dispatch`."""
        stream = self._begin(previous_event, async_finish)
        buffer, native = handle[1]
        if isinstance(bias, tuple):
            some = tuple(one for one in bias if one is not None)
            bias = some if len(some) == 2 else some[0] if some else None
        combined = buffer.combine(
            x, native, topk_weights=topk_weights, bias=bias, multiprocessors=_multiprocessors(config), stream=stream
        )
        return combined.x, combined.topk_weights, self._end(stream, async_finish)

    def internode_dispatch(self, *arguments: Any, **options: Any) -> tuple[Any, ...]:
        """As `dispatch`. All ranks are on one host: a `Buffer` of several raises `SeveralHostsError` when it is made."""
        return self.dispatch(*arguments, **options)

    def internode_combine(self, *arguments: Any, **options: Any) -> tuple[Any, ...]:
        """As `combine`. All ranks are on one host: a `Buffer` of several raises `SeveralHostsError` when it is made."""
        return self.combine(*arguments, **options)

    # Low latency.

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Makes memory for low-latency calls of these sizes ready; every rank calls it. There is nothing to clean."""
        self._buffer(hidden, num_experts, num_max_dispatch_tokens_per_rank)

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Tokens, Tensor, tuple[Any, ...], EventOverlap, Callable[[], None] | None]:
        """Sends tokens to their experts: `(recv_x, recv_count, handle, event, hook)`.

        `x` is bfloat16 `[T, H]` of at most `num_max_dispatch_tokens_per_rank` (M) tokens, `topk_idx` int64 `[T, K]`, −1 selects nothing. `recv_x` is
        `[L, R·M, H]`: with `use_fp8` a pair of float8_e4m3fn and scales, float32 `[L, R·M, H / 128]` or with `use_ue8m0` int32 `[L, R·M, H / 512]`, of
        which four exponents share a word; stride 1 along tokens. `round_scale` rounds scales to powers of two. Of the block of each expert the first
        `recv_count` (int32 `[L]`) rows came. `handle` is (int32 `[L, R·M]` token index at its source, int64 `[L, R]` first row << 32 | rows of each
        source, M, H, E).

        The counts are added to `cumulative_local_expert_recv_stats` (int32 `[L]`), the nanoseconds for which each rank was waited for to
        `dispatch_wait_recv_cost_stats` (int64 `[R]`). With `return_recv_hook` the call only sends, and outputs have their values once `hook()` was
        called: views of them must be made after that. At most two results are sent and not received at once."""
        self._check_hook(async_finish, return_recv_hook)
        stream = self._begin(None, async_finish)
        buffer = self._buffer(x.size(1), num_experts, num_max_dispatch_tokens_per_rank)
        cast = None if not use_fp8 else "ue8m0" if use_ue8m0 else "power_of_two" if round_scale else "float32"
        sent = buffer.low_latency_dispatch_send(x, topk_idx, cast=cast, stream=stream)
        experts, rows, hidden = len(buffer.local_experts), self.group_size * num_max_dispatch_tokens_per_rank, x.size(1)
        soon = lambda dtype, *shape: torch.empty(1, dtype=dtype, device=x.device).expand(shape)  # noqa: E731
        recv_x = soon(torch.float8_e4m3fn if use_fp8 else x.dtype, experts, rows, hidden)
        scales = None
        if use_fp8:
            columns = hidden // 512 if use_ue8m0 else -(-hidden // 128)
            scales = soon(torch.int32 if use_ue8m0 else torch.float32, experts, rows, columns)
        count, source = soon(torch.int32, experts), soon(torch.int32, experts, rows)
        ranges = soon(torch.int64, experts, self.group_size)

        def receive() -> None:
            with torch.cuda.stream(stream):
                got = sent.receive()
                recv_x.set_(got.x)
                if scales is not None:
                    scales.set_(got.scales.transpose(1, 2))
                count.set_(got.counts)
                source.set_(got.handle.source_tokens)
                ranges.set_(got.handle.layout_range)
                source._unisono_route = (buffer, got.handle)
                if cumulative_local_expert_recv_stats is not None:
                    cumulative_local_expert_recv_stats.add_(count)
                if dispatch_wait_recv_cost_stats is not None:
                    dispatch_wait_recv_cost_stats.add_(got.waited)

        if not return_recv_hook:
            receive()
        handle = (source, ranges, num_max_dispatch_tokens_per_rank, hidden, num_experts)
        recv = recv_x if scales is None else (recv_x, scales)
        return recv, count, handle, self._end(stream, async_finish), receive if return_recv_hook else None

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Callable[[], None] | None]:
        """Brings results back: `(x, event, hook)`, `[T, H]`, the sum of weight · result over the selections of each token.

        `x` is bfloat16 `[L, R·M, H]`, the results in the places of the rows that the dispatch of `handle` brought; with `zero_copy` they lie in
        `get_next_low_latency_combine_buffer(handle)`, and `x` is not looked at. `topk_idx` is what was dispatched, `topk_weights` float32 `[T, K]`.
        With `use_logfmt` rows travel in 8 bits. `out` takes the result, if it is given. The rest is as in `low_latency_dispatch`."""
        self._check_hook(async_finish, return_recv_hook)
        stream = self._begin(None, async_finish)
        buffer, native = _route_of(handle)
        sent = buffer.low_latency_combine_send(
            None if zero_copy else x, topk_idx, topk_weights, native, quantised=use_logfmt, stream=stream
        )
        combined = out
        if combined is None:
            dtype = torch.bfloat16 if zero_copy else x.dtype
            combined = torch.empty(1, dtype=dtype, device=topk_idx.device).expand(topk_idx.size(0), handle[3])

        def receive() -> None:
            with torch.cuda.stream(stream):
                got = sent.receive()
                if out is None:
                    combined.set_(got.x)
                else:
                    out.copy_(got.x)
                if combine_wait_recv_cost_stats is not None:
                    combine_wait_recv_cost_stats.add_(got.waited)

        if not return_recv_hook:
            receive()
        return combined, self._end(stream, async_finish), receive if return_recv_hook else None

    def get_next_low_latency_combine_buffer(self, handle: tuple[Any, ...]) -> Tensor:
        """Memory for the results of the next combine of `handle` with `zero_copy`: bfloat16 `[L, R·M, H]`."""
        buffer, _ = _route_of(handle)
        return torch.from_dlpack(buffer.combine_buffer("bfloat16"))

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """With `mask`, leaves a rank out of low-latency calls of the shapes that were used so far; one rank has to call it. Without, takes the rank in
        again, as `low_latency_clean_mask_buffer` does with all, and with the same errors; every rank calls it then, with the same rank.

        Raises `ValueError` if there is no such rank, or ranks take in different ones; with `mask`, `ArgumentError` for this rank itself, or without
        `enable_shrink`."""
        call = "low_latency_update_mask_buffer"
        if not 0 <= rank_to_mask < self.group_size:
            raise ValueError(f"{call} on rank {self.rank}: expected a rank below {self.group_size}, got {rank_to_mask}")
        if not mask:
            self._take_in(call, rank_to_mask)
            return
        for key, buffer in self._buffers.items():
            if key[2] is not None and rank_to_mask not in buffer.masked:
                buffer.mask_rank(rank_to_mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Writes into `mask_status`, int32 `[R]`, a 1 for each rank that is left out, else 0. Local. A rank that the others left out finds itself."""
        masked = {rank for buffer in self._buffers.values() for rank in buffer.masked}
        mask_status.copy_(torch.tensor([int(rank in masked) for rank in range(self.group_size)], dtype=torch.int32))

    def low_latency_clean_mask_buffer(self) -> None:
        """Takes in again all ranks that were left out: of those that live, not of the dead. With `enable_shrink` it is collective over all ranks,
        those included that are left out, whose calls raise `GivenUpError`: they agree on who is left out of which shape by any of them, and make new
        memory for these shapes, beside the old, which ends then. If nobody is left out, nothing changes. Without `enable_shrink` there is nothing to do.

        Where memory was made anew, outputs stay valid, and handles, hooks that were not called and captured graphs of calls before are of no use any
        more. Raises `PeerDiedError`, which names the rank, if one has died (`PeerLeftError` if it left): the mask stays, and the others can go on.
        A rank that lives and does not call within the timeout of `Communicator` raises `TimeoutError`, which fails the low-latency calls, too."""
        self._take_in("low_latency_clean_mask_buffer", None)

    # Inside.

    def _buffer(self, hidden: int, experts: int, capacity: int | None = None) -> ep.Buffer:
        """The buffer of these sizes, which is made when all ranks first use it."""
        key = (hidden, experts, capacity)
        if key not in self._buffers:
            low_latency: dict[str, Any] = {} if capacity is None else {"capacity": capacity, "low_latency": True}
            buffer = ep.Buffer(self._communicator, hidden, experts, masking=self.enable_shrink, **low_latency)
            buffer.exchange()
            self._buffers[key] = buffer
        return self._buffers[key]

    def _take_in(self, call: str, only: int | None) -> None:
        """Takes in `only`, or everybody, wherever any rank knows of them as left out."""
        if not self.enable_shrink:
            return
        if self._device is not None:
            torch.cuda.synchronize(self._device)  # so that all is known that kernels find
        keys, asked = list(self._buffers), EVERYBODY if only is None else only
        # Whom it is about, and for each buffer which ranks are left out.
        mine = torch.zeros(1 + len(keys), self.group_size, dtype=torch.int32, device="cpu")
        mine[0] = asked
        for row, key in zip(mine[1:], keys):
            row[list(self._buffers[key].masked)] = 1
        told = torch.empty(self.group_size, *mine.shape, dtype=torch.int32, device="cpu")
        self._communicator.all_gather(mine, out=told)
        for rank, other in enumerate(told[:, 0, 0].tolist()):
            if other != asked:
                expected, got = ("all ranks" if one == EVERYBODY else f"rank {one}" for one in (asked, other))
                raise ValueError(f"{call} on rank {self.rank}: expected to take in {expected} as here, got {got} on rank {rank}")
        for key, row in zip(keys, told[:, 1:].amax(0).tolist()):
            masked = {rank for rank, is_masked in enumerate(row) if is_masked}
            if not masked or (only is not None and only not in masked):
                continue
            before = self._buffers[key]
            renewed = before.renew()
            # Nobody leaves the end of the old one before all others are left out again.
            stay = set() if only is None else masked - {only}
            for rank in stay - {self.rank}:
                renewed.mask_rank(rank)
            self._buffers[key] = renewed
            before.close()

    def _begin(self, previous_event: EventOverlap | None, async_finish: bool) -> torch.cuda.Stream | None:
        """The stream of a call, which waits for what comes before; None for the current one."""
        previous = None if previous_event is None else previous_event.event
        if self._device is None or not async_finish:
            if previous is not None:
                previous.current_stream_wait()
            return None
        stream = self.get_comm_stream()
        if previous is None or previous.event is None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        else:
            stream.wait_event(previous.event)
        return stream

    def _end(self, stream: torch.cuda.Stream | None, async_finish: bool) -> EventOverlap:
        return EventOverlap(EventHandle(stream) if async_finish else None)

    def _check_hook(self, async_finish: bool, return_recv_hook: bool) -> None:
        if async_finish and return_recv_hook:
            raise ValueError("a low-latency call: expected async_finish or return_recv_hook, got both")


class Runtime:
    """What engines ask of `Buffer.runtime`."""

    def __init__(self, device: int) -> None:
        self.device, self.is_open = device, True

    def is_available(self) -> bool:
        """Whether the buffer was made and not destroyed."""
        return self.is_open

    def get_num_rdma_ranks(self) -> int:
        """Hosts: 1."""
        return 1

    def get_rdma_rank(self) -> int:
        """The number of this host: 0."""
        return 0

    def get_local_device_id(self) -> int:
        """The number of this rank's GPU, −1 without one."""
        return self.device


def _meet(group: dist.ProcessGroup | None, comm: Any, options: dict[str, Any]) -> tuple[Communicator, StoreServer | None]:
    """The communicator of these ranks, and the store that it needs as long as ranks may still come."""
    if group is not None:
        return Communicator.from_process_group(group, **options), None
    if comm is None:
        raise ValueError("Buffer: expected a process group of torch, or a communicator of mpi4py as comm=, got neither")
    rank, server = comm.Get_rank(), None
    if rank == 0:
        server = StoreServer()
    unique_id = comm.bcast(bytes(server.unique_id) if server else None, root=0)
    return Communicator.from_unique_id(UniqueId(unique_id), rank, comm.Get_size(), **options), server


def _layout(topk_idx: Tensor, experts: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """The layout by operations of torch: what is used before any buffer is there."""
    if experts % ranks:
        raise ValueError(f"get_dispatch_layout: expected a number of experts that {ranks} ranks divide, got {experts}")
    nobody = topk_idx < 0
    owners = torch.where(nobody, ranks, topk_idx // (experts // ranks))
    is_in_rank = torch.zeros(topk_idx.size(0), ranks + 1, dtype=torch.bool, device=topk_idx.device)
    is_in_rank = is_in_rank.scatter_(1, owners, True)[:, :ranks].contiguous()
    to_expert = torch.zeros(experts + 1, dtype=torch.int32, device=topk_idx.device)
    selections = torch.where(nobody, experts, topk_idx).flatten()
    to_expert = to_expert.scatter_add_(0, selections, torch.ones_like(selections, dtype=torch.int32))[:experts].contiguous()
    return is_in_rank.sum(0, dtype=torch.int32), to_expert, is_in_rank


def _route_of(handle: tuple[Any, ...]) -> tuple[ep.Buffer, ep.LowLatencyHandle]:
    route = getattr(handle[0], "_unisono_route", None)
    if route is None:
        raise ValueError("a low-latency handle: expected one whose dispatch was received (by its hook), got one before that, or of something else")
    return route


def _multiprocessors(config: Config | None) -> int | None:
    """The most that a call takes: what it would take itself (None), if that is less."""
    most = Buffer.num_sms if config is None else config.num_sms
    return most if most < MULTIPROCESSORS else None


def _up_to(value: int, step: int) -> int:
    return -(-value // step) * step
