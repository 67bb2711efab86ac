//! Memory of the same size on the devices of all ranks, which each of them reaches: first made, then exchanged once, then
//! there for as long as somebody holds it, or handed over to whoever does from then on.
//!
//! The steps are a state machine over any kind of memory, so that what must be refused is tested without a GPU.

use std::sync::Arc;

use unisono_cuda::{Device, Location, SharedPages};
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

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (rank, length) = bytes.split_first_chunk()?;
        let bytes = u64::from_le_bytes(length.try_into().ok()?);
        Some(Self { rank: u32::from_le_bytes(*rank), bytes })
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

/// Makes `bytes` on our device and exchanges them with all ranks. Collective; `item` names them. A rank that cannot make
/// its own tells the others, so that nobody waits.
pub(crate) fn share(
    neighbours: &Neighbours,
    device: &Device,
    (item, bytes): (u32, usize),
    make: impl FnOnce() -> unisono_cuda::Result<SharedPages>,
    deadline: Deadline,
    is_aborted: &dyn Fn() -> bool,
) -> Result<Vec<Arc<SharedPages>>> {
    let (rank, ranks) = (neighbours.me(), neighbours.world_size());
    let failed = |error| Error::Cuda { rank, error };
    let ours = make().map(Arc::new);
    let is_local = neighbours.is_one_process();
    let given = match &ours {
        Ok(pages) if is_local => Ok(Given::Here(pages.clone())),
        Ok(pages) => pages.export().map(|descriptor| Given::Descriptors(vec![descriptor])),
        Err(_) => Ok(Given::Nothing),
    };
    let (given, problem) = match given {
        Ok(given) => (given, None),
        Err(error) => (Given::Nothing, Some(error)),
    };
    let claim = Claim { rank: rank as u32, bytes: bytes as u64 };
    let letters = neighbours.exchange(item, &claim.to_bytes(), &given, deadline, is_aborted)?;
    let ours = problem.map_or(ours, Err).map_err(failed)?;
    let mapped = ours.bytes();
    let mut exchange = Exchange::new(ranks, claim, ours);
    let unreadable = Claim { rank: u32::MAX, bytes: 0 };
    let read = |parcel: Option<Parcel>| {
        parcel.map(|parcel| (Claim::from_bytes(&parcel.body).unwrap_or(unreadable), parcel.given))
    };
    let all = letters.into_iter().map(read).collect();
    exchange.exchange(all, |peer, given| {
        let none = || Error::Device { rank, reason: format!("rank {peer} has no memory to give") };
        match given {
            Given::Descriptors(mut descriptors) => {
                let descriptor = descriptors.pop().ok_or_else(none)?;
                SharedPages::import(device, descriptor, mapped, Location::Device)
                    .map(Arc::new)
                    .map_err(failed)
            }
            Given::Here(memory) => {
                let pages: Arc<SharedPages> = memory.downcast().map_err(|_| none())?;
                pages.allow(device).map_err(failed)?;
                Ok(pages)
            }
            Given::Nothing => Err(none()),
        }
    })?;
    Ok(exchange.all()?.to_vec())
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
        assert_eq!((Claim::from_bytes(&claim.to_bytes()), Claim::from_bytes(&[1; 11])), (Some(claim), None));
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
