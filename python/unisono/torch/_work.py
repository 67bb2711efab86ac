"""What the methods of the backend return: operations that are complete, in flight on the host, or in a stream of a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import unisono


class Work(dist.Work):
    """An operation that is complete, or lies in the stream that was current. ``tensors`` hold its result."""

    source = -1

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        dist.Work.__init__(self)
        self.tensors = tensors

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return self.exception() is None

    def exception(self) -> BaseException | None:
        return None

    def result(self) -> list[torch.Tensor]:
        return self.tensors

    def source_rank(self) -> int:
        return self.source

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future:
        future = torch.futures.Future(devices=list({x.device for x in self.tensors if x.is_cuda}))
        future.set_result(self.tensors)
        return future


class HostWork(Work):
    """Works of the library on host memory, and what is to be done when the last of them is complete. They are in order, or one."""

    def __init__(self, tensors: list[torch.Tensor], parts: list[unisono.Work], after: Callable[[], object] | None) -> None:
        super().__init__(tensors)
        self.parts: list[unisono.Work] | None = parts
        self.after = after
        self.error: Exception | None = None
        self.over: torch.futures.Future | None = None
        self.future: torch.futures.Future | None = None
        self.lock = threading.Lock()
        parts[-1].add_done_callback(None)

    def conclude(self, _last: unisono.Work | None = None) -> None:
        """When the works are complete or have failed: does the rest, once."""
        with self.lock:
            if self.parts is None:
                return
            try:
                for part in self.parts:
                    part.wait()
                if self.after is not None:
                    self.after()
            except Exception as error:
                self.error = error
            self.parts = self.after = None
        if self.over is not None:
            self.over.set_result(None)

    def value(self, _over: Any) -> list[torch.Tensor]:
        if self.error is not None:
            raise self.error
        return self.tensors

    def wait(self, timeout: timedelta | None = None) -> bool:
        # The library waits without the lock, which its own thread may want.
        if (parts := self.parts) is not None:
            try:
                for part in parts:
                    part.wait(timeout or None)
            except unisono.UnisonoError:
                pass  # and `conclude` meets it again
            self.conclude()
        if self.error is not None:
            raise self.error
        return True

    def is_completed(self) -> bool:
        if (parts := self.parts) is None:
            return True
        try:
            is_over = parts[-1].is_completed()
        except unisono.UnisonoError:
            is_over = True
        if is_over:
            self.conclude()
        return is_over

    def exception(self) -> BaseException | None:
        return self.error

    def get_future(self) -> torch.futures.Future:
        """It fails where those of C++ look, too, with the sentence of the error; an exception that is set from Python they would not see."""
        with self.lock:
            if self.future is not None:
                return self.future
            over = torch.futures.Future()
            self.future = over.then(self.value)
            if self.parts is not None:
                self.over = over
                self.parts[-1].add_done_callback(self.conclude)
                return self.future
        over.set_result(None)
        return self.future


class AnyWork(Work):
    """A message from whoever sends one: it is received when somebody waits for it."""

    def __init__(self, tensors: list[torch.Tensor], receive: Callable[..., int]) -> None:
        super().__init__(tensors)
        self.receive = receive

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self.source < 0:
            self.source = self.receive(**({"timeout": timeout} if timeout else {}))
        return True

    def is_completed(self) -> bool:
        return self.source >= 0

    def get_future(self) -> torch.futures.Future:
        self.wait()
        return super().get_future()


class StreamWork(Work):
    """What lies in a stream of its own. It keeps ``tensors``."""

    def __init__(self, tensors: list[torch.Tensor], communicator: unisono.Communicator, stream: torch.cuda.Stream) -> None:
        super().__init__(tensors)
        self.communicator = communicator
        self.stream = stream

    def exception(self) -> BaseException | None:
        try:
            self.communicator.check()
        except unisono.UnisonoError as error:
            return error
        return None

    def get_future(self) -> torch.futures.Future:
        future, stream = torch.futures.Future(devices=[self.stream.device]), self.stream
        if torch.cuda.current_device() != stream.device_index:
            with torch.cuda.stream(stream):
                future.set_result(self.tensors)
            return future
        # The same without asking for the device again and again, which takes longer than all else here.
        before = torch.cuda.current_stream(stream.device_index)
        torch.cuda.set_stream(stream)
        try:
            future.set_result(self.tensors)
        finally:
            torch.cuda.set_stream(before)
        return future


class CallWork(StreamWork):
    """Calls of the library, of which ``last`` is the last: it knows the event behind them."""

    def __init__(
        self, tensors: list[torch.Tensor], communicator: unisono.Communicator, stream: torch.cuda.Stream, last: unisono.Work
    ) -> None:
        super().__init__(tensors, communicator, stream)
        self.last = last

    def wait(self, timeout: timedelta | None = None) -> bool:
        self.last.wait()
        return True

    def is_completed(self) -> bool:
        try:
            return self.last.is_completed()
        except unisono.UnisonoError:
            return True  # and `wait` and `exception` tell of it


class EventWork(StreamWork):
    """Whatever the stream holds now, with an event of torch behind it."""

    def __init__(
        self, tensors: list[torch.Tensor], communicator: unisono.Communicator, stream: torch.cuda.Stream, on_host: bool = False
    ) -> None:
        super().__init__(tensors, communicator, stream)
        self.event = stream.record_event()
        self.on_host = on_host

    def wait(self, timeout: timedelta | None = None) -> bool:
        torch.cuda.current_stream(self.stream.device).wait_event(self.event)
        if self.on_host:
            self.event.synchronize()
        self.communicator.check()
        return True

    def is_completed(self) -> bool:
        return self.event.query()


class Works(Work):
    """Several operations."""

    def __init__(self, works: list[Any]) -> None:
        super().__init__([x for work in works for x in work.tensors])
        self.works = works

    def wait(self, timeout: timedelta | None = None) -> bool:
        return all([work.wait(timeout) for work in self.works])

    def is_completed(self) -> bool:
        return all([work.is_completed() for work in self.works])

    def exception(self) -> BaseException | None:
        return next((error for work in self.works if (error := work.exception())), None)

    def get_future(self) -> torch.futures.Future:
        futures = [work.get_future() for work in self.works]
        return torch.futures.collect_all(futures).then(lambda done: [x for each in done.value() for x in each.value()])
