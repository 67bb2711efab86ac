//! Communicators made of others: who is in which, in what order, and that each works and ends by itself.
//!
//! Every world runs as threads of one hub, and as ranks that meet as processes do (sockets, descriptors, mappings).
#![allow(clippy::print_stdout, reason = "the seed of a run that fails")]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use support::random::{self, Random};
use support::threads::{on_built, on_threads};
use unisono::{Communicator, Error, Memory, Operations, ReduceOp, group};

/// Runs `rank` on both kinds of worlds.
fn on_both(world_size: usize, rank: impl Fn(Communicator) + Send + Sync + Clone + 'static) {
    on_threads(world_size, rank.clone());
    on_built(world_size, |builder| builder.timeout(Some(Duration::from_secs(50))), rank);
}

/// A communicator whose members are known: `members[r]` is the number in the world of its rank r.
struct Family {
    communicator: Communicator,
    members: Vec<usize>,
}

impl Family {
    fn check(&self, world_rank: usize) {
        assert_eq!(self.communicator.world_size(), self.members.len());
        assert_eq!(self.members[self.communicator.rank()], world_rank);
    }

    /// A collective of each kind and messages around, all with results that only these members give.
    fn work(&self, world_rank: usize, salt: u64) {
        let (rank, size) = (self.communicator.rank(), self.members.len());
        let mut sum = vec![salt + world_rank as u64; 1 + (salt % 3000) as usize];
        self.communicator.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
        let expected: u64 = self.members.iter().map(|member| salt + *member as u64).sum();
        assert!(sum.iter().all(|got| *got == expected));
        let mut all = vec![u64::MAX; size];
        self.communicator.all_gather_into(&[world_rank as u64], &mut all).unwrap();
        assert!(all.iter().zip(&self.members).all(|(got, member)| *got == *member as u64), "{all:?}");
        let (next, previous) = ((rank + 1) % size, (rank + size - 1) % size);
        let mut got = [0; 1];
        if size > 1 {
            self.communicator.send_recv(&[salt ^ world_rank as u64], next, &mut got, previous, 3).unwrap();
            assert_eq!(got[0], salt ^ self.members[previous] as u64);
        }
        let root = salt as usize % size;
        let mut x = [if rank == root { salt } else { 0 }; 20];
        self.communicator.broadcast(&mut x, root).unwrap();
        assert_eq!(x, [salt; 20]);
    }

    /// Splits by colours and keys that all members draw for each other.
    fn split(&self, world_rank: usize, seed: u64) -> Option<Self> {
        let wish = |member: usize| {
            let mut random = Random::of(&[seed, member as u64, 7]);
            let color = (!random.once_in(5)).then(|| [0, 1, 2, u32::MAX][random.below(4)]);
            (color, random.below(3) - 1)
        };
        let (color, key) = wish(world_rank);
        let communicator = self.communicator.split(color, key).unwrap();
        let mut members: Vec<usize> =
            self.members.iter().copied().filter(|member| wish(*member).0 == color).collect();
        members.sort_by_key(|member| wish(*member).1);
        assert_eq!(communicator.is_some(), color.is_some());
        communicator.map(|communicator| Self { communicator, members })
    }
}

/// A tree of communicators: works in those that are there, in turn, makes more of them, and ends them in any order.
fn grow(communicator: Communicator, seed: u64) {
    let world_rank = communicator.rank();
    let members = (0..communicator.world_size()).collect();
    // By the number of their birth, which all members know.
    let mut families = BTreeMap::from([(0u64, Family { communicator, members })]);
    let mut births = 0;
    for step in 0..30 {
        // All ranks draw the same family; who is no member of it does nothing.
        let mut random = Random::of(&[seed, step]);
        let (which, action) = (random.next() % (births + 1), random.below(4));
        births += u64::from(action <= 1);
        let Some(family) = families.get(&which) else { continue };
        family.check(world_rank);
        match action {
            0 => {
                if let Some(child) = family.split(world_rank, seed ^ step) {
                    families.insert(births, child);
                }
            }
            1 => {
                let communicator = family.communicator.duplicate().unwrap();
                let members = family.members.clone();
                families.insert(births, Family { communicator, members });
            }
            2 => family.work(world_rank, random.next() % 10_000),
            // One parent in four ends before its children.
            _ if random.once_in(4) => {
                families.remove(&which).unwrap().communicator.destroy().unwrap();
            }
            _ => family.work(world_rank, 1),
        }
        if let Some(family) = families.values().nth(random.below(3)) {
            assert!(family.communicator.check().is_ok());
        }
    }
    for (birth, family) in families {
        family.work(world_rank, birth);
        family.communicator.destroy().unwrap();
    }
}

#[test]
fn families_of_every_size_work_and_end_in_any_order() {
    let seed = random::seed();
    println!("UNISONO_TEST_SEED={seed}");
    for world_size in 1..=9 {
        on_both(world_size, move |communicator| grow(communicator, seed ^ world_size as u64));
    }
}

#[test]
fn a_child_outlives_its_parent_however_that_ends() {
    on_both(3, |communicator| {
        let world_rank = communicator.rank();
        let child = communicator.split(Some(7), -(world_rank as i32)).unwrap().unwrap();
        let grandchild = child.duplicate().unwrap();
        assert_eq!((child.rank(), grandchild.rank()), (2 - world_rank, 2 - world_rank));
        drop(communicator);
        let family = Family { communicator: grandchild, members: vec![2, 1, 0] };
        family.work(world_rank, 5);
        let mut window = family.communicator.window::<u32>(5000, Memory::Host).unwrap();
        window.lend().unwrap().fill(world_rank as u32);
        child.destroy().unwrap();
        family.communicator.all_reduce(&mut window, ReduceOp::Max).unwrap();
        assert_eq!(window.lend().unwrap()[4999], 2);
        window.close(&family.communicator).unwrap();
        family.communicator.destroy().unwrap();
    });
}

#[test]
fn a_child_that_fails_leaves_its_parent_and_siblings_alone() {
    on_both(4, |communicator| {
        let world_rank = communicator.rank();
        let pair = communicator.split(Some(world_rank as u32 / 2), 0).unwrap().unwrap();
        let twin = pair.duplicate().unwrap();
        match world_rank {
            0 => pair.observer().abort("a test"),
            1 => {
                let error = loop {
                    if let Err(error) = pair.check() {
                        break error;
                    }
                };
                assert!(matches!(error, Error::Aborted { rank: 0, .. }), "{error}");
            }
            _ => {
                pair.barrier().unwrap();
                pair.destroy().unwrap();
            }
        }
        let twin = Family { communicator: twin, members: vec![world_rank & 2, world_rank & 2 | 1] };
        let parent = Family { communicator, members: (0..4).collect() };
        for family in [twin, parent] {
            family.work(world_rank, 9);
            family.communicator.destroy().unwrap();
        }
    });
}

#[test]
fn children_name_their_own_ranks_and_where_those_run() {
    on_both(3, |communicator| {
        let world_rank = communicator.rank();
        // Ranks 2 and 0 become 0 and 1.
        let child = communicator.split((world_rank != 1).then_some(0), -(world_rank as i32)).unwrap();
        if let Some(child) = child {
            drop(communicator);
            let error = match child.rank() {
                0 => child.barrier().unwrap_err(),
                _ => child.all_reduce(&mut [1.0f32], ReduceOp::Sum).unwrap_err(),
            };
            let Error::Mismatch { left, right } = &error else { panic!("{error}") };
            let both = [left.as_str(), right.as_str()];
            assert!(both.contains(&"barrier #1 on rank 0"), "{error}");
            assert!(both.contains(&"all_reduce #1 on rank 1 (f32, 1, sum)"), "{error}");
        }
    });
}

#[test]
fn ranks_that_disagree_on_a_split_are_told_so() {
    on_both(2, |communicator| {
        let error = match communicator.rank() {
            0 => communicator.split(None, 0).unwrap_err(),
            _ => communicator.duplicate().unwrap_err(),
        };
        assert!(error.to_string().contains("split #1 on rank 0"), "{error}");
        assert!(error.to_string().contains("duplicate #1 on rank 1"), "{error}");
    });
}

#[test]
fn one_thread_drives_parent_and_child_in_one_group() {
    on_both(2, |communicator| {
        let child = communicator.duplicate().unwrap();
        let (stream, rank) = (unisono::Stream::host(), communicator.rank());
        let (mut a, mut b) = ([rank as u32], [0u32]);
        group(|group| {
            // The two ranks use them in different orders.
            if rank == 0 {
                group.on(&communicator, &stream).all_reduce(&mut a, ReduceOp::Sum)?;
                group.on(&child, &stream).broadcast(&mut b, 1)?;
            } else {
                b[0] = 6;
                group.on(&child, &stream).broadcast(&mut b, 1)?;
                group.on(&communicator, &stream).all_reduce(&mut a, ReduceOp::Sum)?;
            }
            Ok(())
        })
        .unwrap();
        assert_eq!((a, b), ([1], [6]));
        child.destroy().unwrap();
        communicator.destroy().unwrap();
    });
}
