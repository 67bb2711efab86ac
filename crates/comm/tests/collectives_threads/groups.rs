//! One thread that drives all ranks: windows, communicators made of others, and their ends, through groups.

use unisono::{
    Communicator, Error, Memory, Operations, Promised, ReduceOp, Result, Stream, Symmetric, Window, group,
};

/// What `make` gives for each rank, made in one group.
fn all<'b, T>(
    ranks: &'b [Communicator],
    stream: &'b Stream,
    make: impl Fn(&unisono::Grouped<'_, 'b>, usize) -> Result<Promised<T>>,
) -> Result<Vec<Result<T>>> {
    let promised = group(|group| {
        let ranks = ranks.iter().enumerate();
        ranks.map(|(rank, communicator)| make(&group.on(communicator, stream), rank)).collect()
    });
    promised.map(|promised: Vec<_>| promised.into_iter().map(Promised::take).collect())
}

fn destroy(ranks: Vec<Communicator>) -> Result<()> {
    group(|group| {
        ranks.into_iter().for_each(|rank| group.destroy(rank));
        Ok(())
    })
}

#[test]
fn one_thread_makes_uses_and_closes_windows_of_all_ranks() {
    let (ranks, stream) = (Communicator::threads(3).unwrap(), Stream::host());
    let count = 100_000;
    let made = all(&ranks, &stream, |on, _| on.window::<u32>(count, Memory::Host)).unwrap();
    let mut windows: Vec<Window<u32>> = made.into_iter().map(Result::unwrap).collect();
    for (rank, window) in windows.iter_mut().enumerate() {
        window.lend().unwrap().fill(1 << rank);
    }
    let mut sizes = [[7u8; 3]; 3];
    // Operations of a group come before what else it is asked for, whatever the order in the closure.
    let second: Vec<Promised<Window<f64>>> = group(|group| {
        let parts = ranks.iter().zip(&mut windows).zip(&mut sizes);
        let each = |((rank, window), sizes)| {
            let on = group.on(rank, &stream);
            let promised = on.window::<f64>(5, Memory::Host)?;
            on.all_reduce(window, ReduceOp::Sum)?;
            on.all_gather::<u8>(sizes)?;
            Ok(promised)
        };
        parts.map(each).collect()
    })
    .unwrap();
    for window in &mut windows {
        assert!(window.lend().unwrap().iter().all(|value| *value == 7));
    }
    let second: Vec<Window<f64>> = second.into_iter().map(|promised| promised.take().unwrap()).collect();
    assert_eq!(second.iter().map(|window| (window.id(), window.len())).collect::<Vec<_>>(), [(2, 5); 3]);
    // Several requests of one communicator keep their order.
    let made: Vec<Promised<Symmetric<f64>>> = group(|group| {
        let each = |((rank, window), second)| {
            let on = group.on(rank, &stream);
            on.close(window)?;
            on.into_symmetric(second)
        };
        ranks.iter().zip(windows).zip(second).map(each).collect()
    })
    .unwrap();
    let symmetric: Vec<_> = made.into_iter().map(|promised| promised.take().unwrap()).collect();
    symmetric[0].write(2, 4, &[2.5]).unwrap();
    let mut got = [0.0];
    symmetric[1].read(2, 4, &mut got).unwrap();
    assert_eq!(got, [2.5]);
    destroy(ranks).unwrap();
}

#[test]
fn one_thread_splits_duplicates_and_ends_all_of_them() {
    let (ranks, stream) = (Communicator::threads(4).unwrap(), Stream::host());
    let colors = [Some(3), None, Some(3), Some(8)];
    let children = all(&ranks, &stream, |on, rank| on.split(colors[rank], -(rank as i32))).unwrap();
    let children: Vec<Option<Communicator>> = children.into_iter().map(Result::unwrap).collect();
    let places =
        |child: &Option<Communicator>| child.as_ref().map(|child| (child.rank(), child.world_size()));
    assert_eq!(
        children.iter().map(places).collect::<Vec<_>>(),
        [Some((1, 2)), None, Some((0, 2)), Some((0, 1))]
    );
    let duplicates = all(&ranks, &stream, |on, _| on.duplicate()).unwrap();
    let duplicates: Vec<Communicator> = duplicates.into_iter().map(Result::unwrap).collect();
    let (mut sums, mut small) = ([[1u64]; 4], [[1u64]; 4]);
    group(|group| {
        for (rank, sum) in duplicates.iter().zip(&mut sums) {
            group.on(rank, &stream).all_reduce(sum, ReduceOp::Sum)?;
        }
        for (child, sum) in children.iter().zip(&mut small) {
            if let Some(child) = child {
                group.on(child, &stream).all_reduce(sum, ReduceOp::Sum)?;
            }
        }
        Ok(())
    })
    .unwrap();
    assert_eq!((sums, small), ([[4]; 4], [[2], [1], [2], [1]]));
    // Worlds that have nothing to do with each other end in one group, in any order.
    let all = duplicates.into_iter().chain(children.into_iter().flatten()).chain(ranks);
    destroy(all.collect()).unwrap();
}

#[test]
fn one_thread_closes_memory_of_every_kind_and_makes_new() {
    let (ranks, stream) = (Communicator::threads(3).unwrap(), Stream::host());
    for round in 0..3 {
        for memory in [Memory::Host, Memory::Pinned] {
            let count = 1000 << round;
            let window = || all(&ranks, &stream, |on, _| on.window::<u64>(count, memory)).unwrap();
            let [mut used, given]: [Vec<Window<u64>>; 2] =
                std::array::from_fn(|_| window().into_iter().map(Result::unwrap).collect());
            assert!(
                used[round].lend().unwrap().iter().all(|value| *value == 0),
                "new memory, not what was closed"
            );
            used.iter_mut().for_each(|window| window.lend().unwrap().fill(5));
            let promised: Vec<Promised<Symmetric<u64>>> = group(|group| {
                let each = |((rank, used), given)| {
                    let on = group.on(rank, &stream);
                    on.all_reduce(used, ReduceOp::Sum)?;
                    on.into_symmetric(given)
                };
                ranks.iter().zip(&mut used).zip(given).map(each).collect()
            })
            .unwrap();
            let symmetric: Vec<_> = promised.into_iter().map(|promised| promised.take().unwrap()).collect();
            assert_eq!(used[2].lend().unwrap(), vec![15; count]);
            symmetric[1].write(0, count - 1, &[7]).unwrap();
            // Windows and one-sided memory, in another order than they were made, and a new one behind them.
            let again: Vec<Promised<Window<u64>>> = group(|group| {
                let each = |((rank, used), symmetric)| {
                    let on = group.on(rank, &stream);
                    on.close(symmetric)?;
                    on.close(used)?;
                    on.window(1, memory)
                };
                ranks.iter().zip(used).zip(symmetric).map(each).collect()
            })
            .unwrap();
            group(|group| {
                let again = again.into_iter().map(|promised| promised.take().unwrap());
                ranks.iter().zip(again).try_for_each(|(rank, window)| group.on(rank, &stream).close(window))
            })
            .unwrap();
        }
    }
    destroy(ranks).unwrap();
}

#[test]
fn ranks_that_close_different_windows_are_both_named() {
    let (ranks, stream) = (Communicator::threads(2).unwrap(), Stream::host());
    let window = || all(&ranks, &stream, |on, _| on.window::<u8>(1, Memory::Host)).unwrap();
    let mut windows = [window(), window()].map(|windows| windows.into_iter().map(Result::unwrap));
    let error = group(|group| {
        group.on(&ranks[0], &stream).close(windows[0].next().unwrap())?;
        group.on(&ranks[1], &stream).close(windows[1].nth(1).unwrap())
    })
    .unwrap_err();
    let Error::Mismatch { left, right } = &error else { panic!("{error}") };
    for rank in 0..2 {
        let named = format!("close window #5 on rank {rank}");
        assert!([left, right].iter().any(|call| call.starts_with(&named)), "{error}");
    }
    assert_eq!(destroy(ranks).unwrap_err(), error);
}

#[test]
fn counts_that_differ_are_named_to_all_ranks_of_the_thread() {
    let (ranks, stream) = (Communicator::threads(3).unwrap(), Stream::host());
    let mut kept = Vec::new();
    let error = group(|group| {
        for (rank, communicator) in ranks.iter().enumerate() {
            kept.push(group.on(communicator, &stream).window::<f32>(10 + rank / 2, Memory::Host)?);
        }
        Ok(())
    })
    .unwrap_err();
    let Error::Mismatch { left, right } = &error else { panic!("{error}") };
    let both = [left.as_str(), right.as_str()];
    assert!(both.contains(&"window #1 on rank 2 (f32, 11)"), "{both:?}");
    assert!(both.iter().any(|call| call.ends_with("(f32, 10)")), "{both:?}");
    for promised in kept {
        assert_eq!(promised.take().unwrap_err(), error);
    }
    assert_eq!(destroy(ranks).unwrap_err(), error);
}

#[test]
fn what_is_refused_before_the_end_leaves_everything_as_it_was() {
    let (ranks, stream) = (Communicator::threads(2).unwrap(), Stream::host());
    let others = Communicator::threads(1).unwrap();
    let windows = all(&others, &stream, |on, _| on.window::<u8>(1, Memory::Host)).unwrap();
    let strange = windows.into_iter().next().unwrap().unwrap();
    let mut early = None;
    let error = group(|group| {
        early = Some(group.on(&ranks[0], &stream).window::<f32>(10, Memory::Host)?);
        group.on(&ranks[1], &stream).close(strange)
    })
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "close window on rank 1: window should be a window of this communicator, got window 1 of another one. Nothing was \
         written."
    );
    let unmade = early.unwrap().take().unwrap_err();
    let expected = "window on rank 0: time of asking for its result should be after the end of the group, got a group that has \
                    not carried it out. Nothing was written.";
    assert_eq!(unmade.to_string(), expected);
    // Nor is a value there while the group goes on.
    let result = group(|group| group.on(&ranks[0], &stream).duplicate()?.take().map(drop));
    assert!(matches!(result, Err(Error::Argument { call: "duplicate", rank: 0, .. })), "{result:?}");
    // Nothing has been done: the next call of both ranks is their first.
    let mut sums = [[1u8], [2]];
    group(|group| {
        let mut ranks = ranks.iter().zip(&mut sums);
        ranks.try_for_each(|(rank, sum)| group.on(rank, &stream).all_reduce(sum, ReduceOp::Sum))
    })
    .unwrap();
    assert_eq!(sums, [[3], [3]]);
    destroy(ranks).unwrap();
    destroy(others).unwrap();
}

#[test]
fn a_failure_of_one_world_leaves_the_other_in_order() {
    let (left, right) = (Communicator::threads(2).unwrap(), Communicator::threads(2).unwrap());
    let stream = Stream::host();
    left[1].observer().abort("enough");
    let mut made = Vec::new();
    let result = group(|group| {
        for rank in &right {
            made.push(group.on(rank, &stream).duplicate()?);
        }
        left.into_iter().for_each(|rank| group.destroy(rank));
        Ok(())
    });
    assert!(matches!(&result, Err(Error::Aborted { rank: 1, .. })), "{result:?}");
    let duplicates = made.into_iter().map(Promised::take).collect::<Result<Vec<_>>>().unwrap();
    destroy(duplicates).unwrap();
    destroy(right).unwrap();
}
