"""Every operation once, between processes, against what numpy computes from the inputs of all ranks."""

import numpy as np

import unisono

with unisono.init(timeout=60) as rank:
    me, n = rank.rank, rank.world_size
    inputs = [np.random.default_rng(7 + r).integers(-50, 50, 12 * n).astype(np.float32) for r in range(n)]
    total = np.sum(inputs, axis=0)
    mine, parts = inputs[me], np.arange(n + 1) * 12

    x = mine.copy()
    assert rank.all_reduce(x) is x
    np.testing.assert_array_equal(x, total)
    out = np.full_like(mine, np.nan)
    assert rank.all_reduce(mine, "max", out=out) is out
    np.testing.assert_array_equal(out, np.max(inputs, axis=0))
    np.testing.assert_array_equal(mine, inputs[me])

    x = mine.copy()
    rank.broadcast(x, n - 1)
    np.testing.assert_array_equal(x, inputs[n - 1])
    np.testing.assert_array_equal(rank.all_gather(mine, out=np.zeros((n, 12 * n), np.float32)), inputs)
    x = rank.reduce(mine.copy(), root=n - 1)
    np.testing.assert_array_equal(x, total if me == n - 1 else mine)
    part = rank.reduce_scatter(mine, out=np.zeros(12, np.float32))
    np.testing.assert_array_equal(part, total[parts[me] : parts[me + 1]])
    all_parts = np.zeros((n, 12 * n), np.float32) if me == 0 else None
    assert rank.gather(mine, out=all_parts) is all_parts
    if all_parts is not None:
        np.testing.assert_array_equal(all_parts, inputs)
    part = rank.scatter(mine if me == n - 1 else None, n - 1, out=np.zeros(12, np.float32))
    np.testing.assert_array_equal(part, inputs[n - 1][parts[me] : parts[me + 1]])
    swapped = rank.all_to_all(mine, out=np.zeros(12 * n, np.float32))
    np.testing.assert_array_equal(swapped, np.concatenate([i[parts[me] : parts[me + 1]] for i in inputs]))

    sizes = [r + 1 for r in range(n)]
    some = np.concatenate([inputs[r][: r + 1] for r in range(n)])
    np.testing.assert_array_equal(rank.all_gather_v(mine[: me + 1], sizes, out=np.zeros(sum(sizes), np.float32)), some)

    right, left = (me + 1) % n, (me - 1) % n
    got = rank.send_recv(mine, np.zeros_like(mine), to=right, source=left, tag=3)
    np.testing.assert_array_equal(got, inputs[left])
    works = [rank.isend(mine, right), rank.irecv(got := np.zeros_like(mine), left)]
    assert [work.wait() is array for work, array in zip(works, (mine, got))] == [True, True]
    np.testing.assert_array_equal(got, inputs[left])

    first = rank.all_reduce(mine.copy(), async_op=True)
    second = rank.all_reduce(mine.copy(), "min", async_op=True)
    np.testing.assert_array_equal(second.wait(), np.min(inputs, axis=0))
    np.testing.assert_array_equal(first.wait(), total)

    with rank.duplicate() as other:
        assert rank.split(me % 2, key=-me).world_size == (n + 1 - me % 2) // 2
        other.barrier()
    print(f"rank {me} is done")
