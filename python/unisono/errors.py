"""The exceptions of the package: one class for each kind of error, all below `UnisonoError`.

The sentence of an exception says what happened and what to do next. Its numbers are attributes: `rank` (on which it was noticed),
`call`, `expected` and `got` wherever there are such, and others that each class names. Timeouts are also `TimeoutError` of Python,
arguments that do not fit also `ValueError`.
"""

from __future__ import annotations

import builtins
from typing import Any


class UnisonoError(RuntimeError):
    """Something that the library refused, or that happened to the job."""

    rank: int | None = None
    call: str | None = None
    expected: Any = None
    got: Any = None

    def __init__(self, message: str, /, **attributes: Any) -> None:
        super().__init__(message)
        for name, value in attributes.items():
            setattr(self, name, value)


class ArgumentError(UnisonoError, ValueError):
    """An argument of this rank does not fit. Nothing was sent or written, and the communicator still works."""

    what: str


class ClosedError(UnisonoError, ValueError):
    """The communicator or the memory was closed before."""


class PlaceError(UnisonoError, ValueError):
    """An array lies where this communicator cannot reach. Nothing was written, and the communicator still works."""


class MismatchError(UnisonoError):
    """Two ranks made different calls: `expected` is that of the rank that noticed, `got` the one it met. The communicator has failed."""


class CountsError(UnisonoError):
    """A part is larger than the input has (`is_input`) or than the receiver has room for: of rank `source`, for rank `to`."""

    source: int
    to: int
    is_input: bool


class PeerDiedError(UnisonoError):
    """A rank's process is gone, stopped or silent; `rank` says which. The `survivors` can go on with `shrink()`."""

    who: str
    how: str
    survivors: list[int]


class GivenUpError(UnisonoError):
    """The other ranks gave this one up: its process was stopped, and runs again. Or an `ep.Buffer` left it out; then `renew()` takes it in again."""

    how: str


class PeerLeftError(UnisonoError):
    """A rank (`rank`) dropped its communicator, or shrinks it, while others still used theirs."""


class TimeoutError(UnisonoError, builtins.TimeoutError):
    """Live ranks did not make a call in time; `missing` names them. The communicator has failed on all ranks."""

    waited_ms: int
    missing: list[str]


class AbortedError(UnisonoError):
    """Somebody aborted the communicator, on rank `rank`."""

    reason: str


class ForkedError(UnisonoError):
    """A communicator is used in a child that was forked from its process."""

    parent: int
    child: int


class DamagedMemoryError(UnisonoError):
    """The shared memory says what no rank can have written. Only a new communicator can go on."""

    who: str
    word: str


class BufferStateError(UnisonoError):
    """A call of an `ep.Buffer` that is not open for it: before the exchange, after the end, or a second exchange. Nothing was sent."""


class BufferSettingsError(UnisonoError, ValueError):
    """Ranks gave other settings for one `ep.Buffer`; `rank` is one of those that differ from most."""

    what: str


class PoisonedError(UnisonoError):
    """Memory whose communicator failed while peers could touch it."""

    id: int
    cause: str


class GenerationError(UnisonoError):
    """Memory of a communicator that was shrunk."""

    window: int
    generation: int


class SignalError(UnisonoError, builtins.TimeoutError):
    """A signal did not come in time. The communicator still works."""

    slot: int
    waited: float


class PacketError(UnisonoError, builtins.TimeoutError):
    """A packet did not come to a kernel in time. The communicator still works."""

    place: int
    waited: float


class InitTimeoutError(UnisonoError, builtins.TimeoutError):
    """Not all ranks met before the deadline; `missing` are the first that did not come."""

    met: int
    world_size: int
    store: str
    waited: float
    missing: list[int]


class InitStalledError(UnisonoError, builtins.TimeoutError):
    """A rank met the others, and was not heard of again before the deadline."""

    who: str
    what: str
    waited: float


class StaleGenerationError(UnisonoError):
    """A process of an earlier start of the job tried to join a later one."""

    job: str


class SeveralHostsError(UnisonoError):
    """The world spans hosts, which this release does not reach."""

    world_size: int
    hosts: list[str]


class NoSecretError(UnisonoError):
    """A secret is required, but the launcher gave none."""

    store: str


class BuilderError(UnisonoError, ValueError):
    """Something is missing that a communicator is made of."""

    problem: str


class DeviceError(UnisonoError):
    """A GPU was asked for, and cannot be had on rank `rank`."""

    reason: str


class NoPeerAccessError(UnisonoError):
    """GPUs that should reach each other's memory do not."""

    reason: str


class RegistrationError(UnisonoError):
    """Memory cannot be registered."""

    reason: str


class NotPreparedError(UnisonoError):
    """The kernels of a call are not loaded, and cannot be now. Nothing was done."""

    what: str
    why: str


class ConcurrentUseError(UnisonoError):
    """Two calls of one communicator ran on its GPU at once."""


class CudaError(UnisonoError):
    """The driver, the compiler or a device refused something."""


class NodeError(UnisonoError):
    """Shared memory or the connections of this host refused something."""


class NodeTimeoutError(NodeError, builtins.TimeoutError):
    """A rank of this host did not connect or answer in time."""


class StoreTimeoutError(UnisonoError, builtins.TimeoutError):
    """A key did not appear in the store before the deadline."""

    store: str
    key: str
    waited: float


class StoreIoError(UnisonoError, ConnectionError):
    """The store could not be reached, or its connection broke."""

    store: str
    action: str
    message: str


class StoreLimitError(UnisonoError, ValueError):
    """A key, a value or their number is above the store's cap. Nothing was stored."""

    store: str
    what: str


class StoreKeyError(UnisonoError, ValueError):
    """The empty key, which no store takes."""

    store: str


class StoreProtocolError(UnisonoError):
    """The other end of a store connection said something that is not of its protocol."""

    store: str
    message: str


class StoreValueError(UnisonoError, ValueError):
    """Nothing can be added to a value that is no integer."""

    store: str
    key: str
    message: str


class StoreAddressError(UnisonoError, ValueError):
    """An address on which a store must not listen."""

    address: str
    reason: str


class LaunchNothingError(UnisonoError):
    """Nothing says that a launcher started this process."""


class LaunchHalfSetError(UnisonoError):
    """One of two variables that belong together is missing."""

    set: str
    missing: str


class LaunchRankError(UnisonoError):
    """A rank that is not below its world size."""

    rank_name: str
    size_name: str
    size: int


class LaunchHostsError(UnisonoError):
    """Ranks on several hosts, and no store that all can reach."""

    launcher: str
    world_size: int


class LaunchNoStoreError(UnisonoError):
    """Several ranks, and nothing that says where they meet."""

    launcher: str
    world_size: int


class SecretSourceError(UnisonoError):
    """The job's secret is not where it should be."""

    source: str
    message: str


class JobDirectoryError(UnisonoError):
    """The private directory for the files of a job cannot be used."""

    path: str
    message: str


class TuneFileError(UnisonoError):
    """The tuning file cannot be read, is damaged, or is of another kind of machine."""

    path: str
    message: str


class InterfaceError(UnisonoError):
    """A network interface that is not there."""

    name: str
    there_are: str


class UnknownNameError(UnisonoError, ValueError):
    """A name that is not one of ours."""

    kind: str


class MemberError(UnisonoError, ValueError):
    """A rank outside its world, or an empty world."""

    world_size: int
    max: int


class UnsupportedError(UnisonoError, ValueError):
    """The dtype has no such reduction; `expected` are those that it has."""

    op: str
    dtype: str


class ReductionError(UnisonoError, ValueError):
    """The buffers of a reduction do not fit together."""

    op: str
    dtype: str
    what: str


class UniqueIdError(UnisonoError, ValueError):
    """The bytes are no unique id."""

    what: str


class MalformedError(UnisonoError, ValueError):
    """Bytes that do not decode."""

    what: str


class TooLargeError(UnisonoError, ValueError):
    """A length or count above its cap."""

    what: str


class AuthError(UnisonoError):
    """The peer does not know the job's secret."""

    reason: str


class TamperedError(UnisonoError):
    """A frame was altered, repeated, dropped or reordered on its way."""

    sequence: int


class VersionError(UnisonoError):
    """A peer speaks another version of the protocol."""


class DisagreementError(UnisonoError):
    """Ranks do not fit into one world: `left` says `expected`, `right` says `got`."""

    what: str
    left: str
    right: str


class DuplicateRankError(UnisonoError):
    """Two processes claim one rank: `expected` came first, `got` was refused."""


class SettingError(UnisonoError, ValueError):
    """A setting has a value that cannot be read."""

    name: str


class TuningError(UnisonoError, ValueError):
    """A tuning file that cannot be read."""

    line: int


class ForeignTuningError(UnisonoError, ValueError):
    """A tuning file of another kind of machine."""
