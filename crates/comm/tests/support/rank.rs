//! One rank that runs cases: it lays out buffers, submits a batch of calls back to back, and then verifies each alone.
//!
//! What ranks may do differently in one call is drawn per rank: in place or not, byte addresses, the door to the library.

use unisono::{Communicator, Kind, Observer, Stream, Window, reduce_op};

use super::case::{Case, Memory};
use super::data::{PIECE_BYTES, fill};
use super::random::Random;
use super::region::{MAX_SHIFT, Region, footprint, submit_raw, submit_slices, with_scalar};

/// Which buffers a rank hands over.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Form {
    /// One buffer.
    InPlace,
    /// Two that are the same memory: for an all-gather, the own part at its place.
    SameMemory,
    OutOfPlace,
}

/// The door to the library.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Door {
    Raw,
    Slices,
    Stream,
}

/// A case with its buffers.
struct Prepared {
    case: Case,
    form: Form,
    door: Door,
    source: Option<Region>,
    target: Region,
}

/// What runs between calls, to make ranks early and late.
pub(crate) type Pause<'a> = &'a mut dyn FnMut();

/// A rank, its communicator and its windows.
pub(crate) struct Rank {
    communicator: Communicator,
    windows: [Window<u8>; 2],
    seed: u64,
    /// What messages call the communicator.
    name: String,
    /// Inputs of one piece, by rank; then the expected result.
    inputs: Vec<Vec<u8>>,
    expected: Vec<u8>,
}

impl Rank {
    /// Makes the windows, of `window_bytes` each. Collective.
    pub(crate) fn new(
        communicator: Communicator,
        name: &str,
        seed: u64,
        window_bytes: usize,
    ) -> unisono::Result<Self> {
        let window = || communicator.window::<u8>(window_bytes, unisono::Memory::Host);
        let windows = [window()?, window()?];
        let inputs = vec![Vec::new(); communicator.world_size()];
        Ok(Self { communicator, windows, seed, name: name.to_owned(), inputs, expected: Vec::new() })
    }

    pub(crate) const fn rank(&self) -> usize {
        self.communicator.rank()
    }

    pub(crate) fn world_size(&self) -> usize {
        self.communicator.world_size()
    }

    pub(crate) fn observer(&self) -> Observer {
        self.communicator.observer()
    }

    /// Ends the world: closes one window, leaves the other to the communicator. Collective.
    pub(crate) fn end(self) -> unisono::Result<()> {
        let [first, _second] = self.windows;
        first.close(&self.communicator)?;
        self.communicator.destroy()
    }

    /// Runs these cases back to back, then verifies each. The digest of all results.
    pub(crate) fn run(&mut self, cases: &[Case], pause: Pause<'_>) -> Result<u64, String> {
        let mut used = [0; 2];
        let mut prepared = Vec::with_capacity(cases.len());
        for case in cases {
            let ready = self.prepare(*case, &mut used);
            prepared.push(ready.map_err(|error| self.complaint(case, &error.to_string()))?);
        }
        for ready in &prepared {
            pause();
            self.submit(ready).map_err(|error| {
                self.complaint(&ready.case, &format!("{:?} {:?}: {error}", ready.form, ready.door))
            })?;
        }
        let mut digest = 0;
        for ready in &mut prepared {
            self.verify(ready).map_err(|problem| {
                let doors = format!("{:?} {:?}: {problem}", ready.form, ready.door);
                self.complaint(&ready.case, &doors)
            })?;
            digest = digest_of(digest, ready.target.bytes());
        }
        Ok(digest)
    }

    fn complaint(&self, case: &Case, problem: &str) -> String {
        let (rank, world_size, name) = (self.rank(), self.world_size(), &self.name);
        format!("rank {rank} of {world_size}, {name}, {case:?}, UNISONO_TEST_SEED={}: {problem}", self.seed)
    }

    /// Where the buffers of `case` lie: plain where the windows, of which `used` bytes are taken, are full. Equal on all
    /// ranks.
    fn memory(&self, case: &Case, used: &[usize; 2]) -> Memory {
        let both = footprint(case.bytes()) + footprint(case.result_bytes(self.world_size()));
        let fits = |which: usize| used[which] + both <= self.windows[which].len();
        match case.memory {
            Memory::OneWindow | Memory::ToWindow if fits(1) => case.memory,
            Memory::FromWindow if fits(0) => case.memory,
            Memory::TwoWindows if fits(0) && fits(1) => case.memory,
            _ => Memory::Plain,
        }
    }

    /// A region in window `which` behind what is used of it, or in plain memory.
    fn region(
        &mut self,
        which: Option<usize>,
        used: &[usize; 2],
        bytes: usize,
        shift: usize,
    ) -> unisono::Result<Region> {
        match which {
            None => Ok(Region::plain(bytes, shift)),
            Some(which) => Region::in_window(&mut self.windows[which], used[which], bytes, shift),
        }
    }

    fn prepare(&mut self, case: Case, used: &mut [usize; 2]) -> unisono::Result<Prepared> {
        let rank = self.rank();
        let mut own = Random::of(&[self.seed, case.number, rank as u64, 1]);
        let (bytes, result_bytes) = (case.bytes(), case.result_bytes(self.world_size()));
        let (source_window, target_window) = match self.memory(&case, used) {
            Memory::Plain => (None, None),
            Memory::OneWindow => (Some(1), Some(1)),
            Memory::TwoWindows => (Some(0), Some(1)),
            Memory::FromWindow => (Some(0), None),
            Memory::ToWindow => (None, Some(1)),
        };
        let form = match source_window == target_window {
            true => own.pick(&[Form::InPlace, Form::SameMemory, Form::OutOfPlace, Form::OutOfPlace]),
            false => Form::OutOfPlace,
        };
        let is_plain = (source_window, target_window) == (None, None);
        let door = match is_plain && form != Form::SameMemory {
            true => own.pick(&[Door::Raw, Door::Slices, Door::Stream]),
            false => Door::Raw,
        };
        let mut shift = || if door == Door::Raw && own.once_in(2) { own.below(MAX_SHIFT + 1) } else { 0 };
        let (source_shift, target_shift) = (shift(), shift());
        let mut target = self.region(target_window, used, result_bytes, target_shift)?;
        if let Some(which) = target_window {
            used[which] += footprint(result_bytes);
        }
        let mut source = match form {
            Form::OutOfPlace => Some(self.region(source_window, used, bytes, source_shift)?),
            _ => None,
        };
        if let Some(which) = source_window {
            // Taken in any case: ranks that are in place must find as much room as the others for what comes.
            used[which] += footprint(bytes);
        }
        target.bytes().fill(own.next() as u8);
        let input = match (&mut source, case.kind) {
            (Some(source), _) => source.bytes(),
            (None, Kind::AllGather) => &mut target.bytes()[rank * bytes..(rank + 1) * bytes],
            (None, _) => target.bytes(),
        };
        for (piece, out) in input.chunks_mut(PIECE_BYTES).enumerate() {
            fill((self.seed, case.number), rank, piece, case.dtype, case.style, out);
        }
        Ok(Prepared { case, form, door, source, target })
    }

    fn submit(&self, ready: &Prepared) -> unisono::Result<()> {
        let Prepared { case, form, door, source, target } = ready;
        let kind = with_scalar(case.kind, self.scalar(case, self.rank()));
        let result_count = case.result_bytes(self.world_size()) / case.dtype.size();
        match door {
            Door::Slices => submit_slices(&self.communicator, kind, case.dtype, source.as_ref(), target),
            Door::Stream => {
                let stream = Stream::host();
                let on_stream = self.communicator.on(&stream);
                submit_slices(&on_stream, kind, case.dtype, source.as_ref(), target)
            }
            Door::Raw => {
                let output = target.raw(0, result_count, case.dtype);
                let at_home = if kind == Kind::AllGather { self.rank() * case.bytes() } else { 0 };
                let input = match source {
                    Some(source) => source.raw(0, case.count, case.dtype),
                    None => target.raw(at_home, case.count, case.dtype),
                };
                match (kind, form) {
                    (Kind::Barrier, _) => submit_raw(&self.communicator, kind, &[]),
                    (_, Form::InPlace) => submit_raw(&self.communicator, kind, &[output]),
                    _ => submit_raw(&self.communicator, kind, &[input, output]),
                }
            }
        }
    }

    /// The scalar of a pre-multiplied sum that `rank` uses.
    fn scalar(&self, case: &Case, rank: usize) -> f64 {
        let mut random = Random::of(&[self.seed, case.number, rank as u64, 2]);
        random.pick(&[0.5, -1.0, 3.0, 1.0 / 3.0, 0.0, 1e-3, 65_536.0])
    }

    fn verify(&mut self, ready: &mut Prepared) -> Result<(), String> {
        let (rank, world_size, key) = (self.rank(), self.world_size(), (self.seed, ready.case.number));
        let case = ready.case;
        if !ready.target.is_guarded() {
            return Err("bytes around the output were written".to_owned());
        }
        if let Some(source) = &mut ready.source {
            if !source.is_guarded() {
                return Err("bytes around the input were written".to_owned());
            }
            for (piece, got) in source.bytes().chunks(PIECE_BYTES).enumerate() {
                self.expected.resize(got.len(), 0);
                fill(key, rank, piece, case.dtype, case.style, &mut self.expected);
                compare("the input", piece, got, &self.expected)?;
            }
        }
        let target = ready.target.bytes();
        match case.kind {
            Kind::AllReduce { op } => {
                let scalars: Vec<f64> = (0..world_size).map(|rank| self.scalar(&case, rank)).collect();
                for (piece, got) in target.chunks(PIECE_BYTES).enumerate() {
                    for (rank, input) in self.inputs.iter_mut().enumerate() {
                        input.resize(got.len(), 0);
                        fill(key, rank, piece, case.dtype, case.style, input);
                    }
                    self.expected.resize(got.len(), 0);
                    let inputs: Vec<&[u8]> = self.inputs.iter().map(Vec::as_slice).collect();
                    reduce_op::reference(case.dtype, op, &inputs, &scalars, &mut self.expected)
                        .map_err(|error| error.to_string())?;
                    compare("the output", piece, got, &self.expected)?;
                }
            }
            Kind::Broadcast { root } => self.verify_part(&case, root as usize, target)?,
            Kind::AllGather => {
                for rank in 0..world_size {
                    self.verify_part(&case, rank, &target[rank * case.bytes()..(rank + 1) * case.bytes()])?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// `got` is what `rank` contributed.
    fn verify_part(&mut self, case: &Case, rank: usize, got: &[u8]) -> Result<(), String> {
        for (piece, got) in got.chunks(PIECE_BYTES).enumerate() {
            self.expected.resize(got.len(), 0);
            fill((self.seed, case.number), rank, piece, case.dtype, case.style, &mut self.expected);
            compare(&format!("the part of rank {rank}"), piece, got, &self.expected)?;
        }
        Ok(())
    }
}

fn compare(what: &str, piece: usize, got: &[u8], expected: &[u8]) -> Result<(), String> {
    match got.iter().zip(expected).position(|(got, expected)| got != expected) {
        None => Ok(()),
        Some(at) => {
            let wrong = got.iter().zip(expected).filter(|(got, expected)| got != expected).count();
            let show = |bytes: &[u8]| format!("{:02x?}", &bytes[at & !15..bytes.len().min((at & !15) + 16)]);
            Err(format!(
                "{what} differs first at byte {} ({wrong} of {} bytes of this piece differ): expected {}, got {}",
                piece * PIECE_BYTES + at,
                got.len(),
                show(expected),
                show(got)
            ))
        }
    }
}

/// A digest of `bytes` after `before`.
fn digest_of(before: u64, bytes: &[u8]) -> u64 {
    let words = bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    words.fold(before ^ bytes.len() as u64, |digest, word| {
        (digest ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31)
    })
}
