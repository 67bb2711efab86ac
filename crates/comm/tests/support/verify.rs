//! Fills buffers before a call and compares them after it, byte by byte, part by part and what lies between.

use unisono::reduce_op;

use super::case::{Action, Case};
use super::data::{PIECE_BYTES, fill};
use super::prepared::{Buffer, Prepared};
use super::random::Random;
use super::sides::Content;

/// Digests of the results of a rank.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Digests {
    /// Of those that every rank must have got.
    pub(crate) common: u64,
    /// Of all.
    pub(crate) all: u64,
}

impl Digests {
    /// These after others.
    pub(crate) fn after(self, before: Self) -> Self {
        let mix =
            |before: u64, word: u64| (before ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
        Self { common: mix(before.common, self.common), all: mix(before.all, self.all) }
    }
}

/// Writes what the parts of a buffer hold before the call, and poison between them.
pub(crate) fn lay_out(seed: u64, case: &Case, poison: u8, buffer: &mut Buffer) {
    let Buffer { region, parts, .. } = buffer;
    let bytes = region.bytes();
    bytes.fill(poison);
    for part in parts {
        if let Content::Input { rank, part: number } = part.before {
            for (piece, out) in bytes[part.at..part.at + part.bytes].chunks_mut(PIECE_BYTES).enumerate() {
                fill((seed, case.number), (rank, number), piece, (case.dtype, case.style), out);
            }
        }
    }
}

/// The scalar of a pre-multiplied sum that `rank` uses.
pub(crate) fn scalar(seed: u64, case: &Case, rank: usize) -> f64 {
    let mut random = Random::of(&[seed, case.number, rank as u64, 2]);
    random.pick(&[0.5, -1.0, 3.0, 1.0 / 3.0, 0.0, 1e-3, 65_536.0])
}

/// Compares; keeps its memory from case to case.
pub(crate) struct Verifier {
    seed: u64,
    /// Inputs of one piece; then the expected result.
    inputs: Vec<Vec<u8>>,
    expected: Vec<u8>,
}

impl Verifier {
    pub(crate) const fn new(seed: u64) -> Self {
        Self { seed, inputs: Vec::new(), expected: Vec::new() }
    }

    /// Everything of this case on this rank.
    pub(crate) fn verify(&mut self, ready: &mut Prepared) -> Result<Digests, String> {
        let (case, poison, senders) = (ready.case, ready.poison, ready.senders.take());
        let mut digest = self.verify_buffer(&case, poison, &senders, ("the buffer", &mut ready.first))?;
        if let Some(second) = &mut ready.second {
            digest = self.verify_buffer(&case, poison, &senders, ("the output", second))?;
        }
        Ok(Digests { common: if case.action.has_common_result() { digest } else { 0 }, all: digest })
    }

    /// The digest of the results in the buffer.
    fn verify_buffer(
        &mut self,
        case: &Case,
        poison: u8,
        senders: &[usize],
        (name, buffer): (&str, &mut Buffer),
    ) -> Result<u64, String> {
        if !buffer.region.is_guarded() {
            return Err(format!("bytes around {name} were written"));
        }
        let bytes = buffer.region.bytes();
        let mut order: Vec<usize> = (0..buffer.parts.len()).collect();
        // An empty part may lie where the next one starts.
        order.sort_by_key(|part| (buffer.parts[*part].at, buffer.parts[*part].bytes));
        let mut end = 0;
        for number in order {
            let part = &buffer.parts[number];
            all_poison(&format!("{name} before part {number}"), &bytes[end..part.at], poison)?;

            end = part.at + part.bytes;
            let received =
                |message: usize| senders.get(message).map(|rank| Content::Input { rank: *rank, part: 0 });
            let content = match part.after {
                Content::Received(message) => received(message).ok_or("a message that did not come")?,
                _ => part.after.clone(),
            };
            self.verify_part(case, &content, poison, &bytes[part.at..part.at + part.bytes])
                .map_err(|problem| format!("part {number} of {name}, {content:?}, {problem}"))?;
        }
        all_poison(&format!("{name} behind its parts"), &bytes[end..], poison)?;
        let mut results: Vec<usize> = buffer.results.clone().collect();
        if matches!(case.action, Action::ToAnybody { .. }) {
            results.sort_by_key(|message| senders[*message]);
        }
        if case.action.is_multi() {
            // All buffers got the same, and ranks may have different numbers of them.
            results.truncate(1);
        }
        let result = |part: usize| &bytes[buffer.parts[part].at..][..buffer.parts[part].bytes];
        Ok(results.into_iter().fold(0, |digest, part| digest_of(digest, result(part))))
    }

    fn verify_part(&mut self, case: &Case, content: &Content, poison: u8, got: &[u8]) -> Result<(), String> {
        let (key, look) = ((self.seed, case.number), (case.dtype, case.style));
        for (piece, got) in got.chunks(PIECE_BYTES).enumerate() {
            self.expected.clear();
            self.expected.resize(got.len(), poison);
            match content {
                Content::Poison | Content::Received(_) => {}
                Content::Input { rank, part } => fill(key, (*rank, *part), piece, look, &mut self.expected),
                Content::Reduced(summands) => {
                    let op = case.action.op().ok_or("a sum without a reduction")?;
                    self.inputs.resize(summands.len().max(self.inputs.len()), Vec::new());
                    for (from, input) in summands.iter().zip(&mut self.inputs) {
                        input.resize(got.len(), 0);
                        fill(key, *from, piece, look, input);
                    }
                    let scalars: Vec<f64> =
                        summands.iter().map(|(rank, _)| scalar(self.seed, case, *rank)).collect();
                    let inputs: Vec<&[u8]> =
                        self.inputs[..summands.len()].iter().map(Vec::as_slice).collect();
                    reduce_op::reference(case.dtype, op, &inputs, &scalars, &mut self.expected)
                        .map_err(|error| error.to_string())?;
                }
            }
            compare(piece, got, &self.expected)?;
        }
        Ok(())
    }
}

fn all_poison(what: &str, bytes: &[u8], poison: u8) -> Result<(), String> {
    match bytes.iter().position(|byte| *byte != poison) {
        None => Ok(()),
        Some(at) => Err(format!("{what}: byte {at} of {} was written", bytes.len())),
    }
}

fn compare(piece: usize, got: &[u8], expected: &[u8]) -> Result<(), String> {
    match got.iter().zip(expected).position(|(got, expected)| got != expected) {
        None => Ok(()),
        Some(at) => {
            let wrong = got.iter().zip(expected).filter(|(got, expected)| got != expected).count();
            let show = |bytes: &[u8]| format!("{:02x?}", &bytes[at & !15..bytes.len().min((at & !15) + 16)]);
            Err(format!(
                "differs first at byte {} ({wrong} of {} bytes of this piece differ): expected {}, got {}",
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
