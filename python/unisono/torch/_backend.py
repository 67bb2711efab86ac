"""The backend itself: torch's methods, each as a call of `unisono.Communicator`.

A group has a communicator for memory of the host, made with it, and one for GPUs. What differs between devices is in `start`; how tensors
become arrays that the library takes is in `_tensors`. Tensors that come in lists go through one array, as the library has no lists.

Over 300 lines because torch has so many methods, some by two names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

import unisono

from ._tensors import count, flat, only, parts_of, reduction, refused, spread, writable
from ._work import AnyWork, CallWork, EventWork, HostWork, Work, Works

IS_GROUP = torch.__version__ < (2, 14)
"""Before 2.14 a class of Python cannot be a part of a group, it is one."""

ALIVE: set[Any] = set()
"""All groups that were not ended: C++ may hold one without its half in Python."""
UNSET = c10d.BarrierOptions().timeout

Post = Callable[..., Any]
Pair = tuple[int, None]
"""A stream for calls that come behind the current one, as the library takes it."""


class Backend(dist.ProcessGroup if IS_GROUP else c10d.Backend):  # type: ignore[misc]
    """One rank of a group."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta, options: dict[str, Any]) -> None:
        super().__init__(rank, size)
        self.store = store
        self.options_given = {"timeout": timeout, "init_timeout": timeout, **options}
        device = self.options_given.pop("device", None)
        self.host = unisono.Communicator.from_store(store, rank, size, **self.options_given)
        self.on_gpu: unisono.Communicator | None = None
        self.streams: dict[torch.device, tuple[torch.cuda.Stream, Pair]] = {}
        self.batch: Batch | None = None
        # What `set_timeout` says; otherwise the communicators know.
        self.manner: dict[str, Any] = {}
        self.sequence = 0
        self.meetings = 0
        self.names = {"group": "", "description": ""}
        if device is None and torch.cuda.is_initialized():
            device = torch.cuda.current_device()
        # If all ranks know theirs, messages between two of them need not wait for the others.
        if self.have_all(device is not None):
            try:
                self.on_gpu = self.connect_gpus(device)
            except unisono.UnisonoError:
                pass  # The group may be one for the host alone; otherwise the first call on a GPU meets it again.
            if not self.have_all(self.on_gpu is not None):
                self.on_gpu = None

    def have_all(self, have: bool) -> bool:
        """Whether all ranks have what this one has, or not; all of them ask."""
        all_ = torch.tensor(have)
        self.host.all_reduce(all_, "min")
        return bool(all_)

    def connect_gpus(self, device: Any) -> unisono.Communicator:
        """Every rank calls it."""
        self.meetings += 1
        store = dist.PrefixStore(f"gpu/{self.meetings}", self.store)
        return unisono.Communicator.from_store(store, self.rank(), self.size(), device=device, **self.options_given)

    # How calls are submitted.

    def submit(
        self,
        tensors: list[torch.Tensor],
        is_async: bool,
        post: Post,
        after: Callable[[], object] | None = None,
        staged: Sequence[torch.Tensor] = (),
    ) -> Work:
        """A collective: see ``start``."""
        self.sequence += 1
        return self.start(tensors, is_async, post, after, staged)

    def start(
        self,
        tensors: list[torch.Tensor],
        is_async: bool,
        post: Post,
        after: Callable[[], object] | None = None,
        staged: Sequence[torch.Tensor] = (),
    ) -> Work:
        """Calls ``post(communicator, **manner)``, and ``after`` when that is complete, which gives ``tensors``. ``staged`` are the tensors
        that these two copy, instead of handing them to the library."""
        if tensors[0].is_cuda:
            return self.start_on_gpu(tensors, is_async, post, after, staged)
        if not is_async:
            post(self.host, **self.manner)
            if after is not None:
                after()
            return Work(tensors)
        parts = post(self.host, async_op=True, **self.manner)
        work = HostWork(tensors, parts if isinstance(parts, list) else [parts], after)
        if self.batch is not None:
            self.batch.works.append(work)
        return work

    def start_on_gpu(
        self,
        tensors: list[torch.Tensor],
        is_async: bool,
        post: Post,
        after: Callable[[], object] | None,
        staged: Sequence[torch.Tensor],
    ) -> Work:
        if not is_async and self.batch is None:
            post(self.on_gpu or self.communicator(tensors[0].device), **self.manner)
            if after is not None:
                after()
            return Work(tensors)
        device = tensors[0].device
        communicator, (stream, behind_current) = self.communicator(device), self.stream(device)
        if self.batch is not None:
            try:
                return self.batch.add(communicator, stream, tensors, post, after, staged)
            except BaseException:
                self.drop_coalesced()
                raise
        if after is None:
            parts = post(communicator, stream=behind_current, async_op=True, **self.manner)
            return CallWork(tensors, communicator, stream, parts[-1] if isinstance(parts, list) else parts)
        # What torch does before and after the call goes into the stream as well.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            post(communicator, stream=behind_current[0], **self.manner)
            after()
        keep_for(stream, staged)
        return EventWork(tensors, communicator, stream)

    def communicator(self, device: torch.device) -> unisono.Communicator:
        if self.on_gpu is None:
            self.on_gpu = self.connect_gpus(device)
        return self.on_gpu

    def stream(self, device: torch.device) -> tuple[torch.cuda.Stream, Pair]:
        found = self.streams.get(device)
        if found is None:
            stream = torch.cuda.Stream(device)
            found = self.streams[device] = (stream, (stream.cuda_stream, None))
        return found

    def start_coalescing(self, device: Any = None) -> None:
        self.batch = Batch()

    def end_coalescing(self, device: Any = None) -> Work:
        batch, self.batch = self.batch, None
        if batch is None:
            raise RuntimeError("end_coalescing without start_coalescing")
        return batch.end()

    def drop_coalesced(self) -> None:
        """Instead of ``end_coalescing``, after an error: nothing is posted."""
        batch, self.batch = self.batch, None
        if batch is not None and batch.group is not None:
            batch.group.__exit__(RuntimeError, None, None)

    _start_coalescing, _end_coalescing = start_coalescing, end_coalescing

    # Collectives on one tensor of each rank.

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = c10d.AllreduceOptions()) -> Work:
        x, op = reduction(only(tensors), opts.reduceOp)
        return self.submit(tensors, opts.asyncOp, lambda to, **manner: to.all_reduce(x, op, **manner))

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = c10d.AllreduceCoalescedOptions()) -> Work:
        given = [reduction(x, opts.reduceOp) for x in tensors]
        return self.submit(tensors, opts.asyncOp, lambda to, **manner: [to.all_reduce(x, op, **manner) for x, op in given])

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = c10d.BroadcastOptions()) -> Work:
        x, root = flat(only(tensors)), opts.rootRank
        return self.submit(tensors, opts.asyncOp, lambda to, **manner: to.broadcast(x, root, **manner))

    def reduce(self, tensors: list[torch.Tensor], opts: Any = c10d.ReduceOptions()) -> Work:
        (x, op), root = reduction(only(tensors), opts.reduceOp), opts.rootRank
        return self.submit(tensors, opts.asyncOp, lambda to, **manner: to.reduce(x, op, root=root, **manner))

    # Collectives from one tensor into another.

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = c10d.AllgatherOptions()) -> Work:
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = c10d.AllgatherOptions()
    ) -> Work:
        pairs = [(flat(x.contiguous()), writable(out)) for out, x in zip(outputs, inputs, strict=True)]
        return self.submit(outputs, opts.asyncOp, lambda to, **manner: [to.all_gather(x, out=out, **manner) for x, out in pairs])

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = c10d.ReduceScatterOptions()) -> Work:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = c10d.ReduceScatterOptions()
    ) -> Work:
        given = []
        for out, x in zip(outputs, inputs, strict=True):
            x, op = reduction(x.contiguous(), opts.reduceOp)
            given.append((x, op, reduction(out, opts.reduceOp)[0] if out.is_contiguous() else out))

        def post(to: unisono.Communicator, **manner: Any) -> list[Any]:
            return [to.reduce_scatter(x, op, out=out, **manner) for x, op, out in given]

        return self.submit(outputs, opts.asyncOp, post)

    def gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = c10d.GatherOptions()) -> Work:
        x, root = flat(input.contiguous()), opts.rootRank
        out = writable(output) if root == self.rank() else None
        return self.submit([output if out is not None else input], opts.asyncOp, lambda to, **manner: to.gather(x, root, out=out, **manner))

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: Any = c10d.AllToAllOptions(),
    ) -> Work:
        x, out = flat(input.contiguous()), writable(output)
        if not output_split_sizes and not input_split_sizes:
            return self.submit([output], opts.asyncOp, lambda to, **manner: to.all_to_all(x, out=out, **manner))
        rank, ranks = self.rank(), self.size()
        counts = {
            "send_counts": parts_of(input, input_split_sizes, rank, ranks, "input_split_sizes"),
            "receive_counts": parts_of(output, output_split_sizes, rank, ranks, "output_split_sizes"),
        }
        return self.submit([output], opts.asyncOp, lambda to, **manner: to.all_to_all_v(x, out, **counts, **manner))

    # Collectives on lists: through one array on each side.

    def allgather(
        self, output_lists: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = c10d.AllgatherOptions()
    ) -> Work:
        return self.gather_all([only(output_lists)], [only(inputs)], opts)

    def allgather_coalesced(
        self, output_lists: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = c10d.AllgatherOptions()
    ) -> Work:
        """Outputs are a list for each rank, with what comes of each input."""
        return self.gather_all([list(outputs) for outputs in zip(*output_lists, strict=True)], inputs, opts)

    def gather_all(self, output_lists: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any) -> Work:
        """Outputs are a list for each input, with what comes of each rank."""
        gathered: list[torch.Tensor] = []

        def post(to: unisono.Communicator, **manner: Any) -> list[Any]:
            works = []
            for x, outputs in zip(inputs, output_lists, strict=True):
                counts = [count(out) for out in outputs]
                x = flat(x.contiguous())
                out = x.new_empty(sum(counts))
                gathered.append(out)
                if len(set(counts)) == 1:
                    works.append(to.all_gather(x, out=out, **manner))
                else:
                    works.append(to.all_gather_v(x, counts, out=out, **manner))
            return works

        def after() -> None:
            for out, outputs in zip(gathered, output_lists, strict=True):
                spread(out, outputs)

        staged = [*inputs, *(out for outputs in output_lists for out in outputs)]
        return self.submit(output_lists[0], opts.asyncOp, post, after, staged)

    def gather(self, output_lists: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = c10d.GatherOptions()) -> Work:
        x, root = only(inputs), opts.rootRank
        if root != self.rank():
            given = flat(x.contiguous())
            return self.submit(inputs, opts.asyncOp, lambda to, **manner: to.gather(given, root, **manner))
        outputs, gathered = only(output_lists), []
        if wrong := [out.shape for out in outputs if count(out) != count(x)]:
            raise refused("gather", root, "outputs", f"{x.numel()} elements in each", f"one of shape {list(wrong[0])}")

        def post(to: unisono.Communicator, **manner: Any) -> Any:
            given = flat(x.contiguous())
            gathered.append(given.new_empty(sum(count(out) for out in outputs)))
            return to.gather(given, root, out=gathered[0], **manner)

        return self.submit(outputs, opts.asyncOp, post, lambda: spread(gathered[0], outputs), [x, *outputs])

    def scatter(self, outputs: list[torch.Tensor], input_lists: list[list[torch.Tensor]], opts: Any = c10d.ScatterOptions()) -> Work:
        root, out = opts.rootRank, only(outputs)
        inputs = only(input_lists) if root == self.rank() else None
        received: list[torch.Tensor] = []

        def post(to: unisono.Communicator, **manner: Any) -> Any:
            received.append(torch.empty_like(flat(out.contiguous())))
            x = None if inputs is None else torch.cat([flat(x.contiguous()).reshape(-1) for x in inputs])
            return to.scatter(x, root, out=received[0], **manner)

        return self.submit(outputs, opts.asyncOp, post, lambda: spread(received[0], outputs), [out, *(inputs or [])])

    def reduce_scatter(
        self, outputs: list[torch.Tensor], input_lists: list[list[torch.Tensor]], opts: Any = c10d.ReduceScatterOptions()
    ) -> Work:
        out, inputs = only(outputs), only(input_lists)
        reduced: list[torch.Tensor] = []

        def post(to: unisono.Communicator, **manner: Any) -> Any:
            given = [reduction(x.contiguous(), opts.reduceOp) for x in inputs]
            x, op = torch.cat([x.reshape(-1) for x, _ in given]), given[0][1]
            counts = [x.numel() for x, _ in given]
            reduced.append(x.new_empty(reduction(out.contiguous(), opts.reduceOp)[0].numel()))
            if len(set(counts)) == 1:
                return to.reduce_scatter(x, op, out=reduced[0], **manner)
            return to.reduce_scatter_v(x, counts, op=op, out=reduced[0], **manner)

        return self.submit(outputs, opts.asyncOp, post, lambda: spread(reduced[0], outputs), [out, *inputs])

    def alltoall(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = c10d.AllToAllOptions()) -> Work:
        received: list[torch.Tensor] = []

        def post(to: unisono.Communicator, **manner: Any) -> Any:
            x = torch.cat([flat(x.contiguous()).reshape(-1) for x in inputs])
            send, receive = [count(x) for x in inputs], [count(out) for out in outputs]
            received.append(x.new_empty(sum(receive)))
            return to.all_to_all_v(x, received[0], send_counts=send, receive_counts=receive, **manner)

        return self.submit(outputs, opts.asyncOp, post, lambda: spread(received[0], outputs), [*inputs, *outputs])

    # Messages.

    def send(self, tensors: list[torch.Tensor], to: int, tag: int = 0) -> Work:
        x = flat(only(tensors))
        return self.start(tensors, True, lambda by, **manner: by.send(x, to, tag=tag, **manner))

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int = 0) -> Work:
        x = flat(only(tensors))
        work = self.start(tensors, True, lambda by, **manner: by.recv(x, source, tag=tag, **manner))
        work.source = source
        return work

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int = 0) -> Work:
        x = flat(only(tensors))
        by = self.communicator(x.device) if x.is_cuda else self.host
        return AnyWork(tensors, lambda **manner: by.recv_any(x, tag=tag, **{**self.manner, **manner}))

    # The rest.

    def barrier(self, opts: Any = c10d.BarrierOptions()) -> Work:
        """Of the host; and once GPUs take part, of the current stream as well, for which the host then waits."""
        manner = {"timeout": opts.timeout} if opts.timeout != UNSET else self.manner
        device = getattr(opts, "device", None)
        if self.on_gpu is None and (device is None or device.type != "cuda"):
            if opts.asyncOp:
                return HostWork([], [self.host.barrier(async_op=True, **manner)], None)
            self.host.barrier(**manner)
            return Work([])
        ordinal = self.on_gpu.device if self.on_gpu is not None else device.index
        here = torch.device("cuda", torch.cuda.current_device() if ordinal is None else ordinal)
        stream = torch.cuda.current_stream(here)
        communicator = self.communicator(here)
        communicator.barrier(stream=stream, **manner)
        work = EventWork([], communicator, stream, on_host=True)
        if not opts.asyncOp:
            work.wait()
        return work

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        """A barrier of the host that names all ranks that did not come in time, which ends the group."""
        timeout = getattr(timeout, "timeout", timeout)
        manner = {"timeout": timeout} if timeout and timeout != UNSET else self.manner
        self.host.barrier(**manner)

    def set_timeout(self, timeout: timedelta) -> None:
        self.manner = {"timeout": timeout}

    def abort(self) -> None:
        ALIVE.discard(self)
        for communicator in filter(None, (self.host, self.on_gpu)):
            communicator.abort("torch aborted the process group")

    def shutdown(self) -> None:
        """Ends the group with the other ranks. What failed before is no reason to fail here."""
        ALIVE.discard(self)
        for communicator in filter(None, (self.on_gpu, self.host)):
            try:
                communicator.destroy()
            except unisono.UnisonoError:
                pass

    @property
    def supports_coalescing(self) -> bool:
        return True

    def _get_backend(self, device: torch.device) -> Backend:
        return self

    def _set_sequence_number_for_group(self) -> None:
        """It counts from 0 on all ranks."""

    def _get_sequence_number_for_group(self) -> int:
        return self.sequence

    def get_group_store(self) -> dist.Store:
        return self.store

    def getBackendName(self) -> str:
        return "unisono"

    def getGroupName(self) -> str:
        return self.names["group"]

    def setGroupName(self, name: str) -> None:
        self.names["group"] = name

    def getGroupDesc(self) -> str:
        return self.names["description"]

    def setGroupDesc(self, description: str) -> None:
        self.names["description"] = description

    # torch's other names.

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single
    gather_into_tensor = gather_single
    recvAnysource = recv_anysource


def keep_for(stream: torch.cuda.Stream, tensors: Sequence[torch.Tensor]) -> None:
    """Has torch not give away their memory before the stream has passed what is in it now. The library does so for what it is handed."""
    for x in tensors:
        x.record_stream(stream)


class Batch:
    """Calls that are posted together: on GPUs as a group of the library, on the host one after the other, none of which waits."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.group: unisono.Group | None = None
        self.tensors: list[torch.Tensor] = []
        self.afters: list[Callable[[], object]] = []

    def add(
        self,
        communicator: unisono.Communicator,
        stream: torch.cuda.Stream,
        tensors: list[torch.Tensor],
        post: Post,
        after: Callable[[], object] | None,
        staged: Sequence[torch.Tensor],
    ) -> Work:
        if self.group is None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
            self.communicator, self.stream = communicator, stream
            self.group = unisono.group()
            self.group.__enter__()
        self.tensors += tensors
        if after is None:
            post(communicator, stream=stream.cuda_stream)
            return Work(tensors)
        with torch.cuda.stream(stream):
            post(communicator, stream=stream.cuda_stream)
        keep_for(stream, staged)
        self.afters.append(after)
        return Work(tensors)

    def end(self) -> Work:
        if self.group is None:
            return Works(self.works)
        self.group.__exit__(None, None, None)
        if self.afters:
            with torch.cuda.stream(self.stream):
                for after in self.afters:
                    after()
        return EventWork(self.tensors, self.communicator, self.stream)
