//! How memory that somebody else allocated comes to be reached by the GPUs of all ranks: each rank says where its range lies in
//! which allocation, and hands over what maps that; the others check it and map it.
//!
//! Between threads of one process the address is all, once the device is let in. Between processes the letter carries the
//! handle of CUDA IPC, or file descriptors come beside it: as many at once as a message takes, in as many rounds as the rank
//! with the most mappings needs. Each is turned into a handle of the driver at once, so that few are open at a time.

use std::any::Any;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use unisono_cuda::foreign::{IPC_HANDLE_BYTES, MAX_PIECES, Way};
use unisono_cuda::{Device, Foreign, Imported, Pages};
use unisono_node::socket::MAX_FDS;
use unisono_sync::Deadline;

use super::peers::{Claim, Exchange};
use crate::error::{Error, Result};
use crate::neighbours::{Given, Neighbours, Parcel};

/// Memory of a rank, as our kernels reach it.
#[derive(Clone, Debug)]
pub(crate) struct Reached {
    pub(crate) address: u64,
    pub(crate) held: Arc<dyn Any + Send + Sync>,
}

/// What a rank says of its range, behind the [`Claim`].
#[derive(Clone, PartialEq, Eq, Debug)]
struct Offer {
    /// A number that only its process has.
    process: [u8; 16],
    /// Where the range begins in the first piece.
    offset: u64,
    /// Number in the owner's driver, and length, of each piece.
    pieces: Vec<(u64, u64)>,
    /// For what goes by CUDA IPC.
    handle: Option<[u8; IPC_HANDLE_BYTES]>,
}

/// Bytes of an offer without its pieces.
const FIXED_BYTES: usize = 16 + 8 + 1 + IPC_HANDLE_BYTES + 4;

impl Offer {
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FIXED_BYTES + self.pieces.len() * 16);
        bytes.extend_from_slice(&self.process);
        bytes.extend_from_slice(&self.offset.to_le_bytes());
        bytes.push(u8::from(self.handle.is_some()));
        bytes.extend_from_slice(&self.handle.unwrap_or([0; IPC_HANDLE_BYTES]));
        bytes.extend_from_slice(&(self.pieces.len() as u32).to_le_bytes());
        for (id, length) in &self.pieces {
            bytes.extend_from_slice(&id.to_le_bytes());
            bytes.extend_from_slice(&length.to_le_bytes());
        }
        bytes
    }

    /// `None` for bytes that no rank of ours writes.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (process, bytes) = bytes.split_first_chunk()?;
        let (offset, bytes) = bytes.split_first_chunk()?;
        let ([is_ipc], bytes) = bytes.split_first_chunk()?;
        let (handle, bytes) = bytes.split_first_chunk()?;
        let (count, bytes) = bytes.split_first_chunk()?;
        let (words, rest) = bytes.as_chunks::<8>();
        let count = u32::from_le_bytes(*count) as usize;
        let is_empty = handle.iter().all(|byte| *byte == 0);
        if *is_ipc > 1
            || (*is_ipc == 0 && !is_empty)
            || count > MAX_PIECES
            || words.len() != count * 2
            || !rest.is_empty()
        {
            return None;
        }
        let words = words.as_chunks::<2>().0.iter();
        let pieces = words.map(|[id, length]| (u64::from_le_bytes(*id), u64::from_le_bytes(*length)));
        Some(Self {
            process: *process,
            offset: u64::from_le_bytes(*offset),
            pieces: pieces.collect(),
            handle: (*is_ipc == 1).then_some(*handle),
        })
    }

    /// Whether `bytes` from the offset on lie in the pieces, and begin in the first; what does not is not mapped.
    fn holds(&self, bytes: u64) -> bool {
        let total = self.pieces.iter().try_fold(0u64, |sum, (_, length)| sum.checked_add(*length));
        let first = self.pieces.first().map_or(0, |(_, length)| *length);
        let end = self.offset.checked_add(bytes);
        let is_whole = self.pieces.iter().all(|(_, length)| *length > 0 && usize::try_from(*length).is_ok());
        let is_one = self.handle.is_none() || self.pieces.len() == 1;
        is_whole && is_one && self.offset < first && end.zip(total).is_some_and(|(end, total)| end <= total)
    }

    /// Rounds of descriptors that follow the first.
    const fn more_rounds(&self) -> usize {
        if self.handle.is_some() { 0 } else { self.pieces.len().div_ceil(MAX_FDS).saturating_sub(1) }
    }
}

/// What came of one rank.
#[derive(Debug, Default)]
struct Arrived {
    claim: Option<Claim>,
    offer: Option<Offer>,
    /// It has something to give; who has not says why when all agree.
    gives: bool,
    here: Option<Arc<dyn Any + Send + Sync>>,
    pages: Vec<Pages>,
    problem: Option<Error>,
}

impl Arrived {
    fn add(&mut self, given: Given, device: &Device, rank: usize) {
        match given {
            Given::Nothing => {}
            Given::Here(here) => self.here = Some(here),
            Given::Descriptors(descriptors) => {
                for descriptor in descriptors {
                    match Pages::import(device, descriptor) {
                        Ok(pages) => self.pages.push(pages),
                        Err(error) => self.problem = Some(Error::Cuda { rank, error }),
                    }
                }
            }
        }
    }
}

/// Tells all ranks of `bytes` at `address` of our device, and maps theirs. Collective; `item` names it. A rank that cannot
/// give its own sends a letter all the same, so that nobody waits; then there is nothing for anybody.
pub(crate) fn share(
    neighbours: &Neighbours,
    device: &Device,
    (item, address, bytes): (u32, u64, usize),
    deadline: Deadline,
    is_aborted: &dyn Fn() -> bool,
) -> Result<Option<Exchange<Reached>>> {
    let (rank, ranks) = (neighbours.me(), neighbours.world_size());
    let claim = Claim { rank: rank as u32, bytes: bytes as u64 };
    let ours = Foreign::find(device, address, bytes).map_err(|error| refused(error, rank));
    let is_local = neighbours.is_one_process();
    let mut problem = None;
    let offer = match &ours {
        Ok(found) if !is_local => offer(found, rank).map_err(|error| problem = Some(error)).ok(),
        _ => None,
    };
    let mut letter = claim.to_bytes().to_vec();
    letter.extend(offer.iter().flat_map(Offer::to_bytes));
    let mut arrived: Vec<Arrived> = (0..ranks).map(|_| Arrived::default()).collect();
    let (mut round, mut rounds) = (0, 1);
    while round < rounds {
        let given = match (&ours, &offer) {
            (Ok(found), _) if is_local => Ok(Given::Here(Arc::new(found.clone()))),
            (Ok(found), Some(offer)) if offer.handle.is_none() => {
                descriptors(found, round, rank).map(Given::Descriptors)
            }
            _ => Ok(Given::Nothing),
        };
        let given = given.unwrap_or_else(|error| {
            problem = Some(error);
            Given::Nothing
        });
        let body = if round == 0 { &letter[..] } else { &[] };
        let letters = neighbours.exchange(item, body, &given, deadline, is_aborted)?;
        for (from, Parcel { body, given }) in
            letters.into_iter().enumerate().filter_map(|(from, parcel)| Some((from, parcel?)))
        {
            let arrived = &mut arrived[from];
            if let (0, Some((claim, offer))) = (round, Claim::split_from(&body)) {
                arrived.claim = Some(claim);
                arrived.offer = Offer::from_bytes(offer);
                arrived.gives = !offer.is_empty() || matches!(given, Given::Here(_));
            }
            arrived.add(given, device, rank);
        }
        if round == 0 {
            // Equal on all ranks: each has heard from all.
            let offers = arrived.iter().filter_map(|arrived| arrived.offer.as_ref()).chain(&offer);
            rounds += offers.map(Offer::more_rounds).max().unwrap_or(0);
        }
        round += 1;
    }
    let ours = problem.map_or(ours, Err)?;
    if arrived.iter().enumerate().any(|(from, arrived)| from != rank && !arrived.gives) {
        return Ok(None);
    }
    let mut exchange = Exchange::new(ranks, claim, Reached { address, held: Arc::new(ours) });
    let unreadable = Claim { rank: u32::MAX, bytes: 0 };
    let given = arrived
        .into_iter()
        .enumerate()
        .map(|(from, arrived)| (from != rank).then(|| (arrived.claim.unwrap_or(unreadable), arrived)));
    exchange.exchange(given.collect(), |peer, arrived| map(device, (rank, peer), bytes, arrived))?;
    Ok(Some(exchange))
}

/// Maps what `peer` gave.
fn map(device: &Device, (rank, peer): (usize, usize), bytes: usize, arrived: Arrived) -> Result<Reached> {
    let failed = |error| Error::Cuda { rank, error };
    if let Some(problem) = arrived.problem {
        return Err(problem);
    }
    if let Some(here) = arrived.here {
        let wrong = |_| misfit(rank, peer, "an address", "something else");
        let found = here.downcast::<Foreign>().map_err(wrong)?;
        found.allow(device).map_err(failed)?;
        return Ok(Reached { address: found.address(), held: found });
    }
    let Some(offer) = arrived.offer else {
        return Err(misfit(rank, peer, "an offer", "none"));
    };
    if !offer.holds(bytes as u64) {
        let got = format!("offset {} in {:?}", offer.offset, offer.pieces);
        return Err(misfit(rank, peer, &format!("{bytes} bytes inside its allocation"), &got));
    }
    let imported = match offer.handle {
        // The driver opens no handle in the process that made it.
        Some(_) if offer.process == process(rank)? => {
            let expected = "memory of another process (Communicator::local serves ranks of one)";
            return Err(misfit(rank, peer, expected, "memory of cudaMalloc of this process"));
        }
        Some(handle) => {
            let (id, length) = offer.pieces[0];
            Imported::open(device, offer.process, (id, length as usize), &handle).map_err(failed)?
        }
        None => {
            let (expected, got) = (offer.pieces.len(), arrived.pages.len());
            if expected != got {
                let [expected, got] = [expected, got].map(|count| format!("{count} descriptors"));
                return Err(misfit(rank, peer, &expected, &got));
            }
            let pages = arrived.pages.into_iter().zip(offer.pieces);
            let pieces: Vec<_> = pages.map(|(pages, (id, length))| (pages, id, length as usize)).collect();
            Imported::map(device, offer.process, &pieces).map_err(failed)?
        }
    };
    Ok(Reached { address: imported.address() + offer.offset, held: Arc::new(imported) })
}

/// What a peer gave is not what it should be.
fn misfit(rank: usize, peer: usize, expected: &str, got: &str) -> Error {
    let (expected, got) = (expected.to_owned(), format!("{got} from rank {peer}"));
    Error::Argument { call: "register", rank, what: "memory of a peer", expected, got }
}

/// What is wrong with our own memory.
fn refused(error: unisono_cuda::Error, rank: usize) -> Error {
    match error {
        unisono_cuda::Error::Memory { expected, got } => {
            Error::Argument { call: "register", rank, what: "buffer", expected, got }
        }
        error => Error::Cuda { rank, error },
    }
}

fn offer(found: &Foreign, rank: usize) -> Result<Offer> {
    let handle = match found.way() {
        // Whether they can be had shows at the first.
        Way::Descriptors => found.descriptor(0).map(|_| None).map_err(|error| refused(error, rank))?,
        Way::Ipc | Way::Nowhere => Some(found.ipc_handle().map_err(|error| refused(error, rank))?),
    };
    let pieces = found.pieces().iter().map(|piece| (piece.id, piece.bytes as u64)).collect();
    Ok(Offer { process: process(rank)?, offset: found.offset(), pieces, handle })
}

/// Our descriptors of one round.
fn descriptors(found: &Foreign, round: usize, rank: usize) -> Result<Vec<OwnedFd>> {
    let pieces = (0..found.pieces().len()).skip(round * MAX_FDS).take(MAX_FDS);
    let all: unisono_cuda::Result<Vec<_>> = pieces.map(|piece| found.descriptor(piece)).collect();
    all.map_err(|error| refused(error, rank))
}

/// The number of this process.
fn process(rank: usize) -> Result<[u8; 16]> {
    static NUMBER: OnceLock<Option<[u8; 16]>> = OnceLock::new();
    let number = NUMBER.get_or_init(|| {
        let mut number = [0; 16];
        getrandom::fill(&mut number).is_ok().then_some(number)
    });
    let reason = || "the system gave no random bytes".to_owned();
    number.ok_or_else(|| Error::Device { rank, reason: reason() })
}

/// What the fuzz targets call.
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing {
    use super::{IPC_HANDLE_BYTES, MAX_PIECES, Offer};

    /// What a peer says of memory that it hands over. What is taken lies inside of it.
    ///
    /// # Panics
    /// If it does not, or is not the same once written and read again.
    pub fn offer(bytes: &[u8]) {
        let Some(offer) = Offer::from_bytes(bytes) else { return };
        assert_eq!(offer.to_bytes(), bytes);
        assert!(offer.pieces.len() <= MAX_PIECES);
        for length in [0, 1, 4096, u64::MAX] {
            if offer.holds(length) {
                let total: u64 = offer.pieces.iter().map(|(_, length)| *length).sum();
                assert!(offer.offset < offer.pieces[0].1 && length <= total - offer.offset);
            }
        }
    }

    /// One of each kind.
    pub fn offer_seeds() -> Vec<Vec<u8>> {
        let of = |pieces: &[(u64, u64)], handle| Offer {
            process: [7; 16],
            offset: 36,
            pieces: pieces.to_vec(),
            handle,
        };
        let offers = [
            of(&[(9, 4096)], Some([3; IPC_HANDLE_BYTES])),
            of(&[(9, 2 << 20), (0, 20 << 20)], None),
            of(&[], None),
        ];
        offers.iter().map(Offer::to_bytes).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(pieces: &[(u64, u64)], handle: Option<[u8; IPC_HANDLE_BYTES]>) -> Offer {
        Offer { process: [7; 16], offset: 36, pieces: pieces.to_vec(), handle }
    }

    #[test]
    fn offers_survive_the_wire() {
        let many: Vec<_> = (1..=MAX_PIECES as u64).map(|id| (id, id << 21)).collect();
        for offer in [
            offered(&[(9, 4096)], Some(std::array::from_fn(|at| at as u8))),
            offered(&[(9, 4096), (0, 1 << 40)], None),
            offered(&many, None),
            offered(&[], None),
        ] {
            let bytes = offer.to_bytes();
            assert_eq!(bytes.len(), FIXED_BYTES + offer.pieces.len() * 16);
            assert!(Claim::BYTES + bytes.len() + 1024 < unisono_node::socket::MAX_MESSAGE_BYTES);
            assert_eq!(Offer::from_bytes(&bytes), Some(offer));
        }
    }

    #[test]
    fn bytes_of_another_length_or_meaning_are_no_offer() {
        let bytes = offered(&[(9, 4096), (8, 1)], None).to_bytes();
        for length in 0..bytes.len() {
            assert_eq!(Offer::from_bytes(&bytes[..length]), None);
        }
        assert_eq!(Offer::from_bytes(&[&bytes[..], &[0]].concat()), None);
        let mut wrong = bytes.clone();
        wrong[24] = 2;
        assert_eq!(Offer::from_bytes(&wrong), None);
        let mut wrong = bytes;
        wrong[FIXED_BYTES - 4..FIXED_BYTES].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Offer::from_bytes(&wrong), None);
        assert_eq!(Offer::from_bytes(&offered(&vec![(1, 1); MAX_PIECES + 1], None).to_bytes()), None);
    }

    #[test]
    fn only_ranges_inside_of_what_is_offered_are_mapped() {
        let ipc = Some([0; IPC_HANDLE_BYTES]);
        assert!(offered(&[(9, 4096)], ipc).holds(4060));
        assert!(!offered(&[(9, 4096)], ipc).holds(4061));
        assert!(!offered(&[(9, 4096)], ipc).holds(u64::MAX));
        assert!(offered(&[(9, 4096), (1, 4096)], None).holds(4061));
        assert!(!offered(&[(9, 4096), (1, 4096)], ipc).holds(10), "CUDA IPC names one allocation");
        assert!(!offered(&[(9, 36), (1, 4096)], None).holds(10), "it begins behind the first piece");
        assert!(!offered(&[(9, 4096), (1, 0)], None).holds(10), "an empty piece");
        assert!(!offered(&[(9, u64::MAX), (1, 2)], None).holds(10), "more than there is");
        assert!(!offered(&[], None).holds(0));
    }

    #[test]
    fn descriptors_come_in_as_many_rounds_as_needed() {
        let rounds = |pieces| offered(&vec![(1, 1); pieces], None).more_rounds();
        assert_eq!([0, 1, 8, 9, 16, 512].map(rounds), [0, 0, 0, 1, 1, 63]);
        assert_eq!(offered(&[(1, 1)], Some([0; IPC_HANDLE_BYTES])).more_rounds(), 0);
    }

    #[test]
    fn what_a_peer_gives_is_refused_by_name() {
        let error = misfit(0, 2, "2 descriptors", "1 descriptors").to_string();
        assert_eq!(
            error,
            "register on rank 0: memory of a peer should be 2 descriptors, got 1 descriptors from rank 2. Nothing was written."
        );
        let memory =
            unisono_cuda::Error::Memory { expected: "memory of cuda:0".into(), got: "host memory".into() };
        assert_eq!(
            refused(memory, 1).to_string(),
            "register on rank 1: buffer should be memory of cuda:0, got host memory. Nothing was written."
        );
    }
}
