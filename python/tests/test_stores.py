"""Stores: ours, and objects of Python with torch's methods."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest

import unisono
from unisono import errors


class TorchLike:
    """A store as torch's are: keys are text, values bytes; `wait` raises an error of its own in the end."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def set(self, key, value):
        with self.changed:
            self.values[key] = bytes(value)
            self.changed.notify_all()

    def get(self, key):
        self.wait([key])
        return self.values[key]

    def wait(self, keys, timeout=None):
        with self.changed:
            seconds = None if timeout is None else timeout.total_seconds()
            if not self.changed.wait_for(lambda: all(key in self.values for key in keys), seconds):
                raise RuntimeError("wait timeout")

    def check(self, keys):
        return all(key in self.values for key in keys)

    def add(self, key, amount):
        with self.changed:
            total = int(self.values.get(key, b"0")) + amount
            self.values[key] = str(total).encode()
            self.changed.notify_all()
            return total

    def compare_set(self, key, expected, desired):
        with self.changed:
            if key not in self.values and expected:
                return expected
            if self.values.get(key, b"") == expected:
                self.values[key] = bytes(desired)
                self.changed.notify_all()
            return self.values[key]


@pytest.fixture(params=["memory", "file", "tcp", "torch", "prefix", "python"])
def store(request, tmp_path):
    match request.param:
        case "memory":
            yield unisono.MemoryStore()
        case "file":
            yield unisono.FileStore(tmp_path / "store")
        case "tcp":
            with unisono.StoreServer(secret=bytes(range(32))) as server:
                yield unisono.TcpStore(server.address, bytes(range(32)))
        case "torch":
            with unisono.TorchStoreServer() as server:
                yield unisono.TorchStore(server.address)
        case "prefix":
            yield unisono.PrefixStore("a", unisono.MemoryStore())
        case "python":
            yield unisono.PrefixStore("a", TorchLike())


def test_a_store_does_what_torch_stores_do(store):
    store.set("text", "ä")
    store.set("bytes", b"\x00\xff")
    assert (store.get("text"), store.get("bytes")) == ("ä".encode(), b"\x00\xff")
    assert (store.add("n", 5), store.add("n", -7)) == (5, -2)
    assert store.compare_set("new", b"", b"1") == b"1"
    assert store.compare_set("new", b"0", b"2") == b"1"
    store.append("list", b"a")
    store.append("list", b"b")
    assert store.multi_get(["list", "n"]) == [b"ab", b"-2"]
    assert store.check(["list", "n"]) and not store.check(["list", "none"])
    store.wait(["list"], 5)
    with pytest.raises(TimeoutError) as caught:
        store.get("none", timeout=0.2)
    assert isinstance(caught.value, errors.StoreTimeoutError) and caught.value.key.endswith("none")
    with pytest.raises(TimeoutError):
        store.wait(["list", "none"], timeout=0.1)


def test_ranks_meet_in_any_store(store):
    results = [None] * 2

    def run(number):
        with unisono.Communicator.from_store(store, number, 2, init_timeout=20) as rank:
            results[number] = rank.all_reduce(np.array([number + 1])).tolist()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[3], [3]]


def test_who_does_not_come_is_named():
    with pytest.raises(TimeoutError) as caught:
        unisono.Communicator.from_store(TorchLike(), 1, 3, init_timeout=0.3)
    assert isinstance(caught.value, errors.InitTimeoutError)
    assert (caught.value.met, caught.value.world_size, caught.value.missing) == (1, 3, [0, 2])


def test_an_error_of_a_python_store_comes_out_with_its_words():
    class Broken(TorchLike):
        def compare_set(self, key, expected, desired):
            raise OSError("the disk is on fire")

    with pytest.raises(errors.StoreIoError, match="python:Broken: compare_set failed: OSError: the disk is on fire") as caught:
        unisono.Communicator.from_store(Broken(), 0, 1)
    assert isinstance(caught.value, ConnectionError)


def test_what_is_no_store_is_refused():
    with pytest.raises(errors.ArgumentError) as caught:
        unisono.Communicator.from_store({}, 0, 1)
    assert caught.value.what == "store" and caught.value.got == "dict without set"


def test_unique_ids_travel():
    with unisono.StoreServer() as server:
        unique_id = server.unique_id
        assert len(bytes(unique_id)) == 128
        for copy in (unisono.UniqueId(bytes(unique_id)), unisono.UniqueId.from_text(unique_id.to_text())):
            assert copy == unique_id and hash(copy) == hash(unique_id)
        assert pickle.loads(pickle.dumps(unique_id)) == unique_id
        assert server.secret.hex() not in repr(unique_id) and server.address in repr(unique_id)
    with pytest.raises(errors.UniqueIdError) as caught:
        unisono.UniqueId(b"short")
    assert (caught.value.what, caught.value.got) == ("length", "5 bytes")


def test_a_wrong_secret_is_refused():
    with unisono.StoreServer() as server:
        with pytest.raises(unisono.UnisonoError):
            unisono.TcpStore(server.address, bytes(32), timeout=5)
