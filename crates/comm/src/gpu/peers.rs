//! Memory of the same size on all ranks, which each of them reaches: first made, then exchanged once, then there for as long as
//! somebody holds it, or handed over to whoever does from then on.
//!
//! The steps are a state machine over any kind of memory, so that what must be refused is tested without a GPU.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use unisono_core::settings::HandleKind;
use unisono_cuda::{Device, FabricHandle, Location, SharedPages};
use unisono_sync::Deadline;

use crate::error::{Error, Result};
use crate::neighbours::{Given, Neighbours, Parcel};

/// What a rank says of the memory that it hands over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Claim {
    /// The rank whose memory it is.
    pub(crate) rank: u32,
    /// Its length.
    pub(crate) bytes: u64,
}

impl Claim {
    pub(crate) const BYTES: usize = 12;

    pub(crate) fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.rank.to_le_bytes());
        bytes[4..].copy_from_slice(&self.bytes.to_le_bytes());
        bytes
    }

    /// A claim, and what follows it.
    pub(crate) fn split_from(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (rank, rest) = bytes.split_first_chunk()?;
        let (length, rest) = rest.split_first_chunk()?;
        Some((Self { rank: u32::from_le_bytes(*rank), bytes: u64::from_le_bytes(*length) }, rest))
    }
}

/// The memory of all ranks, on its way.
#[derive(Debug)]
pub(crate) struct Exchange<M> {
    rank: usize,
    ranks: usize,
    bytes: u64,
    state: State<M>,
}

#[derive(Debug)]
enum State<M> {
    Made(M),
    Exchanged(Vec<M>),
    Closed,
}

impl<M: Clone> Exchange<M> {
    /// Ours is made, of the bytes that all ranks agreed on.
    pub(crate) const fn new(ranks: usize, claim: Claim, ours: M) -> Self {
        Self { rank: claim.rank as usize, ranks, bytes: claim.bytes, state: State::Made(ours) }
    }

    fn refuse(&self, what: &'static str, expected: impl ToString, got: impl ToString) -> Error {
        let (expected, got) = (expected.to_string(), got.to_string());
        Error::Argument { call: "exchange of memory", rank: self.rank, what, expected, got }
    }

    fn refuse_state(&self, expected: &str) -> Error {
        let got = match self.state {
            State::Made(_) => "one that was not yet",
            State::Exchanged(_) => "one that was",
            State::Closed => "one that is closed",
        };
        self.refuse("state", expected, got)
    }

    /// Takes what the others gave, by rank; nothing in our own place. Only what fits is mapped, by `map`.
    pub(crate) fn exchange<G>(
        &mut self,
        given: Vec<Option<(Claim, G)>>,
        mut map: impl FnMut(usize, G) -> Result<M>,
    ) -> Result<()> {
        let State::Made(ours) = &self.state else {
            return Err(self.refuse_state("memory that was not exchanged yet"));
        };
        if given.len() != self.ranks {
            return Err(self.refuse("number of handles", self.ranks, given.len()));
        }
        for (rank, given) in given.iter().enumerate() {
            match given {
                None if rank == self.rank => {}
                None => return Err(self.refuse("handle", format!("one of rank {rank}"), "none")),
                Some(_) if rank == self.rank => {
                    return Err(self.refuse("handle in our own place", "none", "one of a peer"));
                }
                Some((claim, _)) if claim.rank as usize != rank => {
                    let got = format!("that of rank {}", claim.rank);
                    return Err(self.refuse("handle", format!("that of rank {rank}"), got));
                }
                Some((claim, _)) if claim.bytes != self.bytes => {
                    return Err(self.refuse("size of a handle in bytes", self.bytes, claim.bytes));
                }
                Some(_) => {}
            }
        }
        let mut all = Vec::with_capacity(self.ranks);
        for (rank, given) in given.into_iter().enumerate() {
            all.push(match given {
                Some((_, given)) => map(rank, given)?,
                None => ours.clone(),
            });
        }
        self.state = State::Exchanged(all);
        Ok(())
    }

    /// The memory of all ranks.
    pub(crate) fn all(&self) -> Result<&[M]> {
        match &self.state {
            State::Exchanged(all) => Ok(all),
            State::Made(_) | State::Closed => Err(self.refuse_state("memory that was exchanged")),
        }
    }

    /// Hands the memory of all ranks over to whoever uses it from now on, and forgets it.
    pub(crate) fn close(&mut self) -> Result<Vec<M>> {
        match std::mem::replace(&mut self.state, State::Closed) {
            State::Exchanged(all) => Ok(all),
            before => {
                self.state = before;
                Err(self.refuse_state("memory that was exchanged"))
            }
        }
    }
}

/// What another process needs to map memory. Which of the two there is, and of what, it sees for itself.
#[derive(Debug)]
pub(crate) struct Exported {
    pub(crate) descriptor: Option<OwnedFd>,
    pub(crate) words: Vec<u8>,
}

/// A kind of memory that ranks make and hand to each other.
pub(crate) trait Kind {
    type Memory: Send + Sync + 'static;

    /// Ours.
    fn make(&self) -> Result<Self::Memory>;

    /// What other processes need to map ours.
    fn export(&self, ours: &Self::Memory) -> Result<Exported>;

    /// Maps what rank `peer` exported.
    fn import(&self, peer: usize, exported: Exported) -> Result<Self::Memory>;

    /// Lets our device into what another rank of this process made.
    fn allow(&self, theirs: &Self::Memory) -> Result<()>;
}

/// Makes memory of `bytes` and exchanges it with all ranks. Collective; `item` names it. A rank that cannot make its own
/// tells the others, so that nobody waits.
pub(crate) fn share<K: Kind>(
    neighbours: &Neighbours,
    kind: &K,
    (item, bytes): (u32, usize),
    deadline: Deadline,
    is_aborted: &dyn Fn() -> bool,
) -> Result<Vec<Arc<K::Memory>>> {
    let (rank, ranks) = (neighbours.me(), neighbours.world_size());
    let claim = Claim { rank: rank as u32, bytes: bytes as u64 };
    let mut body = claim.to_bytes().to_vec();
    let mut given = Given::Nothing;
    let ours = kind.make().and_then(|memory| {
        let memory = Arc::new(memory);
        if neighbours.is_one_process() {
            given = Given::Here(memory.clone());
        } else {
            let exported = kind.export(&memory)?;
            body.extend(exported.words);
            given = match exported.descriptor {
                Some(descriptor) => Given::Descriptors(vec![descriptor]),
                None => Given::Nothing,
            };
        }
        Ok(memory)
    });
    let parcels = neighbours.exchange(item, &body, &given, deadline, is_aborted)?;
    let mut exchange = Exchange::new(ranks, claim, ours?);
    let unreadable = Claim { rank: u32::MAX, bytes: 0 };
    let read = |parcel: Option<Parcel>| {
        parcel.map(|Parcel { body, given }| match Claim::split_from(&body) {
            Some((claim, words)) => (claim, (given, words.to_vec())),
            None => (unreadable, (given, Vec::new())),
        })
    };
    exchange.exchange(parcels.into_iter().map(read).collect(), |peer, (given, words)| {
        let none = || Error::Device { rank, reason: format!("rank {peer} has no memory to give") };
        let descriptor = match given {
            Given::Here(memory) => {
                let memory = memory.downcast().map_err(|_| none())?;
                return kind.allow(&memory).map(|()| memory);
            }
            Given::Nothing if words.is_empty() => return Err(none()),
            Given::Nothing => None,
            Given::Descriptors(descriptors) => descriptors.into_iter().next(),
        };
        kind.import(peer, Exported { descriptor, words }).map(Arc::new)
    })?;
    Ok(exchange.all()?.to_vec())
}

/// Pages of `device` that can be handed over so.
pub(crate) fn on_device(
    device: &Device,
    bytes: usize,
    handles: HandleKind,
) -> unisono_cuda::Result<SharedPages> {
    match handles {
        HandleKind::Fabric => SharedPages::create_with_fabric(device, bytes, Location::Device),
        HandleKind::Auto | HandleKind::Descriptor => SharedPages::create(device, bytes, Location::Device),
    }
}

/// Memory of devices: handed over as a descriptor, or as a fabric handle if that is asked for.
pub(crate) struct OnDevices<'a, F> {
    pub(crate) rank: usize,
    pub(crate) device: &'a Device,
    pub(crate) bytes: usize,
    pub(crate) handles: HandleKind,
    pub(crate) make: F,
}

impl<F: Fn() -> unisono_cuda::Result<SharedPages>> Kind for OnDevices<'_, F> {
    type Memory = SharedPages;

    fn make(&self) -> Result<SharedPages> {
        (self.make)().map_err(|error| Error::Cuda { rank: self.rank, error })
    }

    fn export(&self, ours: &SharedPages) -> Result<Exported> {
        let failed = |error| Error::Cuda { rank: self.rank, error };
        let mut words = (ours.bytes() as u64).to_le_bytes().to_vec();
        if self.handles == HandleKind::Fabric {
            words.extend(ours.export_fabric().map_err(failed)?.0);
            return Ok(Exported { descriptor: None, words });
        }
        Ok(Exported { descriptor: Some(ours.export().map_err(failed)?), words })
    }

    fn import(&self, peer: usize, exported: Exported) -> Result<SharedPages> {
        let failed = |error| Error::Cuda { rank: self.rank, error };
        let mapped = length(&exported.words, self.bytes);
        match (exported.descriptor, mapped) {
            (Some(descriptor), Some((bytes, _))) => {
                SharedPages::import(self.device, descriptor, bytes, Location::Device).map_err(failed)
            }
            (None, Some((bytes, handle))) if handle.len() == 64 => {
                let mut words = [0; 64];
                words.copy_from_slice(handle);
                SharedPages::import_fabric(self.device, &FabricHandle(words), bytes).map_err(failed)
            }
            _ => Err(unusable(self.rank, peer)),
        }
    }

    fn allow(&self, theirs: &SharedPages) -> Result<()> {
        theirs.allow(self.device).map_err(|error| Error::Cuda { rank: self.rank, error })
    }
}

/// How long a peer says that its memory is, which must be at least `bytes`, and what it says behind that. The driver refuses
/// to map more than there is.
pub(crate) fn length(words: &[u8], bytes: usize) -> Option<(usize, &[u8])> {
    let (mapped, rest) = words.split_first_chunk()?;
    let mapped = usize::try_from(u64::from_le_bytes(*mapped)).ok()?;
    (mapped >= bytes).then_some((mapped, rest))
}

/// A peer handed over what is no handle of memory.
pub(crate) fn unusable(rank: usize, peer: usize) -> Error {
    Error::Device { rank, reason: format!("what rank {peer} handed over is no memory of the agreed size") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange() -> Exchange<char> {
        Exchange::new(3, Claim { rank: 1, bytes: 64 }, 'b')
    }

    fn letter(rank: u32, bytes: u64, memory: char) -> Option<(Claim, char)> {
        Some((Claim { rank, bytes }, memory))
    }

    fn refused(given: Vec<Option<(Claim, char)>>) -> String {
        let mut exchange = exchange();
        let error = exchange.exchange(given, |_, _| panic!("nothing is mapped")).unwrap_err();
        assert!(exchange.all().is_err(), "nothing is half exchanged");
        error.to_string()
    }

    #[test]
    fn memory_is_there_once_it_was_exchanged_and_is_exchanged_once() {
        let mut exchange = exchange();
        assert_eq!(
            exchange.all().unwrap_err().to_string(),
            "exchange of memory on rank 1: state should be memory that was exchanged, got one that was not yet. Nothing was \
             written."
        );
        let claim = Claim { rank: 1, bytes: 64 };
        assert_eq!(Claim::split_from(&claim.to_bytes()), Some((claim, &[][..])));
        assert_eq!(Claim::split_from(&[1; 11]), None);
        let given = || vec![letter(0, 64, 'a'), None, letter(2, 64, 'c')];
        exchange.exchange(given(), |_, memory| Ok(memory)).unwrap();
        assert_eq!(exchange.all().unwrap(), ['a', 'b', 'c']);
        let error = exchange.exchange(given(), |_, memory| Ok(memory)).unwrap_err();
        assert!(error.to_string().contains("memory that was not exchanged yet, got one that was"), "{error}");
        assert_eq!(exchange.all().unwrap(), ['a', 'b', 'c']);
    }

    #[test]
    fn memory_is_handed_over_once_and_is_not_there_any_more() {
        let mut exchange = exchange();
        assert!(exchange.close().unwrap_err().to_string().contains("got one that was not yet"));
        let given = || vec![letter(0, 64, 'a'), None, letter(2, 64, 'c')];
        exchange.exchange(given(), |_, memory| Ok(memory)).unwrap();
        assert_eq!(exchange.close().unwrap(), ['a', 'b', 'c']);
        let all = [
            exchange.close().unwrap_err(),
            exchange.all().unwrap_err(),
            exchange.exchange(given(), |_, memory| Ok(memory)).unwrap_err(),
        ];
        for error in all {
            assert!(error.to_string().contains("got one that is closed"), "{error}");
        }
    }

    #[test]
    fn handles_that_do_not_fit_are_refused_before_anything_is_mapped() {
        let whole = || vec![letter(0, 64, 'a'), None, letter(2, 64, 'c')];
        assert!(refused(whole()[..2].to_vec()).contains("number of handles should be 3, got 2"));
        let mut wrong = whole();
        wrong[2] = letter(2, 65, 'c');
        assert!(refused(wrong).contains("size of a handle in bytes should be 64, got 65"));
        let mut wrong = whole();
        wrong[1] = letter(0, 64, 'a');
        assert!(refused(wrong).contains("handle in our own place should be none, got one of a peer"));
        let mut wrong = whole();
        wrong.swap(0, 2);
        assert!(refused(wrong).contains("handle should be that of rank 0, got that of rank 2"));
        let mut wrong = whole();
        wrong[0] = None;
        assert!(refused(wrong).contains("handle should be one of rank 0, got none"));
    }

    /// Memory that is a number, which rank 1 of some worlds has not.
    struct Numbers {
        rank: usize,
        fails: bool,
    }

    impl Kind for Numbers {
        type Memory = usize;

        fn make(&self) -> Result<usize> {
            let reason = "it has no numbers".to_owned();
            if self.fails { Err(Error::Device { rank: self.rank, reason }) } else { Ok(self.rank * 10) }
        }

        fn export(&self, _: &usize) -> Result<Exported> {
            panic!("threads take the memory itself")
        }

        fn import(&self, _: usize, _: Exported) -> Result<usize> {
            panic!("threads take the memory itself")
        }

        fn allow(&self, theirs: &usize) -> Result<()> {
            let reason = "not that one".to_owned();
            if self.rank == 2 && *theirs == 0 { Err(Error::Device { rank: 2, reason }) } else { Ok(()) }
        }
    }

    fn share_numbers(fails: bool) -> Vec<Result<Vec<usize>, String>> {
        let hub = Arc::new(unisono_node::ThreadHub::new(3));
        let run = |rank| {
            let neighbours = Neighbours::world(crate::neighbours::Host::Threads(hub.clone()), rank, 3, 0);
            let kind = Numbers { rank, fails: fails && rank == 1 };
            let shared = share(&neighbours, &kind, (7, 64), Deadline::NEVER, &|| false);
            shared.map(|all| all.iter().map(|number| **number).collect()).map_err(|error| error.to_string())
        };
        std::thread::scope(|scope| {
            let ranks = [0, 1, 2].map(|rank| scope.spawn(move || run(rank)));
            ranks.map(|rank| rank.join().unwrap()).into()
        })
    }

    #[test]
    fn threads_share_the_memory_itself_and_hear_of_a_rank_that_has_none() {
        let shared = share_numbers(false);
        assert_eq!(shared[..2], [Ok(vec![0, 10, 20]), Ok(vec![0, 10, 20])]);
        assert!(shared[2].as_ref().unwrap_err().contains("not that one"), "{shared:?}");
        let shared = share_numbers(true);
        let reasons = ["rank 1 has no memory to give", "it has no numbers", "not that one"];
        for (shared, reason) in shared.iter().zip(reasons) {
            assert!(shared.as_ref().unwrap_err().contains(reason), "{shared:?}");
        }
    }

    #[test]
    fn memory_that_is_shorter_than_agreed_is_no_memory() {
        let words = [&8192u64.to_le_bytes()[..], &[7; 64]].concat();
        assert_eq!(length(&words, 8192), Some((8192, &[7; 64][..])));
        assert_eq!((length(&words, 8193), length(&words[..7], 0)), (None, None));
        assert_eq!(
            unusable(2, 1).to_string(),
            "rank 2 cannot work on its GPU: what rank 1 handed over is no memory of the agreed size"
        );
    }

    #[test]
    fn what_cannot_be_mapped_leaves_the_memory_as_it_was() {
        let mut exchange = exchange();
        let given = vec![letter(0, 64, 'a'), None, letter(2, 64, 'c')];
        let error =
            exchange.exchange(given, |rank, _| Err(Error::Device { rank, reason: "no".into() })).unwrap_err();
        assert!(matches!(error, Error::Device { rank: 0, .. }));
        assert!(exchange.all().is_err());
    }
}
