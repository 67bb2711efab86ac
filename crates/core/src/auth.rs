//! Proving to each other that both ends know the job's secret, and tags on everything that follows.
//!
//! [`Handshake`] is a state machine without IO: three messages of fixed size (40, 72 and 32 bytes) carry two fresh
//! nonces and an HMAC-SHA256 proof in each direction over role, version, nonces and context. Keys for each direction
//! come from the secret, both nonces and the context by HKDF, so every connection has its own. Afterwards [`Sealer`]
//! adds a 16-byte tag and a sequence number to each frame and [`Opener`] checks them: altered, repeated, dropped,
//! reordered or reflected bytes are an error, never data. It hides nothing: the bytes travel in clear. Cost: one
//! and a half round trips, then one pass of SHA-256 over each frame per side.

mod seal;

use std::fmt;

use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::unique_id::Secret;
use crate::wire::VERSION;

pub use self::seal::{Opened, Opener, Sealer, Session, TAG_BYTES};

/// The largest message of a handshake: what a peer must buffer before it knows whom it talks to.
pub const MAX_HANDSHAKE_BYTES: usize = CHALLENGE_BYTES;

/// Magic, version and reserved: equal in all versions, as are the sizes of the first two messages, so that two releases
/// can tell each other that they differ.
const PREAMBLE_BYTES: usize = 8;
const PREAMBLE_MAGIC: [u8; 4] = *b"uniA";
const NONCE_BYTES: usize = 32;
const PROOF_BYTES: usize = 32;
const OPENING_BYTES: usize = PREAMBLE_BYTES + NONCE_BYTES;
const CHALLENGE_BYTES: usize = PREAMBLE_BYTES + NONCE_BYTES + PROOF_BYTES;
/// Sent instead of a proof by an initiator that does not believe its peer, so that the peer learns it too.
const REFUSAL: [u8; PROOF_BYTES] = [0; PROOF_BYTES];

/// Cheap to clone: the key is already mixed in.
type HmacSha256 = Hmac<Sha256>;

/// Which side of a handshake one is: who connects is the initiator, who accepts is the responder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Sends the first message.
    Initiator,
    /// Proves first that it knows the secret.
    Responder,
}

/// One side of the handshake. Drive it until [`finish`](Self::finish) gives the session:
///
/// ```
/// use unisono_core::auth::{Handshake, Role};
/// use unisono_core::Secret;
/// let secret = Secret::new([7; 32]);
/// let mut a = Handshake::new(Role::Initiator, &secret, b"doc", [1; 32]); // nonces must be random and fresh
/// let mut b = Handshake::new(Role::Responder, &secret, b"doc", [2; 32]);
/// b.on_input(&a.poll_output().unwrap())?;
/// a.on_input(&b.poll_output().unwrap())?;
/// b.on_input(&a.poll_output().unwrap())?;
/// let (mut a, b) = (a.finish().unwrap(), b.finish().unwrap());
/// let mut bytes = Vec::new();
/// a.sealer.seal(1, b"hello", &mut bytes)?;
/// # let _ = b;
/// # Ok::<(), unisono_core::Error>(())
/// ```
///
/// After an error there may be one last message for the peer in [`poll_output`](Self::poll_output): sending it lets the
/// peer fail with a reason too instead of a closed connection.
#[derive(Debug)]
pub struct Handshake {
    output: Option<Vec<u8>>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Initiator: the opening is out, the challenge is awaited.
    AwaitChallenge(Own),
    /// Responder: the opening is awaited.
    AwaitOpening(Own),
    /// Responder: the challenge is out, the proof is awaited.
    AwaitProof(Transcript),
    /// Both proofs were given.
    Proven(Box<Session>),
    /// The session was handed out.
    Finished,
    Failed(Error),
}

/// What one side knows from the start.
struct Own {
    secret: Secret,
    context: [u8; 32],
    nonce: [u8; NONCE_BYTES],
}

/// What both sides must agree on, and the secret.
struct Transcript {
    secret: Secret,
    context: [u8; 32],
    initiator_nonce: [u8; NONCE_BYTES],
    responder_nonce: [u8; NONCE_BYTES],
}

impl Handshake {
    /// Starts one side. `context` binds the handshake to what it is for (purpose, generation, pair); both sides must
    /// pass the same; keep it below 256 bytes, only its hash is kept. `nonce` is 32 fresh random bytes: using one
    /// twice with the same secret lets an attacker replay the connection in which it was used.
    pub fn new(role: Role, secret: &Secret, context: &[u8], nonce: [u8; 32]) -> Self {
        let own = Own { secret: secret.clone(), context: Sha256::digest(context).into(), nonce };
        match role {
            Role::Initiator => {
                let mut opening = preamble().to_vec();
                opening.extend_from_slice(&nonce);
                Self { output: Some(opening), state: State::AwaitChallenge(own) }
            }
            Role::Responder => Self { output: None, state: State::AwaitOpening(own) },
        }
    }

    /// Bytes to send now, if any.
    pub fn poll_output(&mut self) -> Option<Vec<u8>> {
        self.output.take()
    }

    /// How many bytes the next message has; 0 when nothing more is expected. At most [`MAX_HANDSHAKE_BYTES`].
    pub fn wants(&self) -> usize {
        match self.state {
            State::AwaitChallenge(_) => CHALLENGE_BYTES,
            State::AwaitOpening(_) => OPENING_BYTES,
            State::AwaitProof(_) => PROOF_BYTES,
            State::Proven(_) | State::Finished | State::Failed(_) => 0,
        }
    }

    /// Takes exactly [`wants`](Self::wants) bytes.
    ///
    /// # Errors
    /// [`Error::Auth`] if the peer has another secret or context or speaks something else, [`Error::Version`] if it
    /// speaks another version, [`Error::Malformed`] for another number of bytes. A failed handshake stays failed.
    pub fn on_input(&mut self, bytes: &[u8]) -> Result<()> {
        let wants = self.wants();
        let result = match std::mem::replace(&mut self.state, State::Finished) {
            State::Failed(error) => Err(error),
            _ if wants == 0 || bytes.len() != wants => Err(Error::Malformed {
                what: "handshake message",
                expected: format!("{wants} bytes"),
                got: format!("{} bytes", bytes.len()),
            }),
            State::AwaitOpening(own) => self.on_opening(own, bytes),
            State::AwaitChallenge(own) => self.on_challenge(own, bytes),
            State::AwaitProof(transcript) => on_proof(&transcript, bytes),
            // `wants` is 0 in these, so the arm above took them.
            State::Proven(_) | State::Finished => Err(Error::Auth { reason: "the handshake is over" }),
        };
        match result {
            Ok(state) => self.state = state,
            Err(error) => self.state = State::Failed(error),
        }
        match &self.state {
            State::Failed(error) => Err(error.clone()),
            _ => Ok(()),
        }
    }

    /// The session, once: after both sides proved that they know the secret and everything from
    /// [`poll_output`](Self::poll_output) was taken. `None` before, and after a failure.
    pub fn finish(&mut self) -> Option<Session> {
        if self.output.is_some() || !matches!(self.state, State::Proven(_)) {
            return None;
        }
        match std::mem::replace(&mut self.state, State::Finished) {
            State::Proven(session) => Some(*session),
            _ => None,
        }
    }

    fn on_opening(&mut self, own: Own, bytes: &[u8]) -> Result<State> {
        let (head, nonce) = bytes.split_at(PREAMBLE_BYTES);
        if let Err(error) = check_preamble(head) {
            if matches!(error, Error::Version { .. }) {
                let mut answer = preamble().to_vec();
                answer.resize(CHALLENGE_BYTES, 0);
                self.output = Some(answer);
            }
            return Err(error);
        }
        let transcript = own.with_peer(Role::Responder, nonce);
        let mut challenge = preamble().to_vec();
        challenge.extend_from_slice(&transcript.responder_nonce);
        challenge.extend_from_slice(&transcript.proof(Role::Responder).finalize().into_bytes());
        self.output = Some(challenge);
        Ok(State::AwaitProof(transcript))
    }

    fn on_challenge(&mut self, own: Own, bytes: &[u8]) -> Result<State> {
        let (head, rest) = bytes.split_at(PREAMBLE_BYTES);
        check_preamble(head)?;
        let (nonce, proof) = rest.split_at(NONCE_BYTES);
        let transcript = own.with_peer(Role::Initiator, nonce);
        if transcript.proof(Role::Responder).verify_slice(proof).is_err() {
            self.output = Some(REFUSAL.to_vec());
            return Err(Error::Auth { reason: "the peer has another secret, or is here for something else" });
        }
        self.output = Some(transcript.proof(Role::Initiator).finalize().into_bytes().to_vec());
        Ok(State::Proven(Box::new(transcript.session(Role::Initiator))))
    }
}

fn on_proof(transcript: &Transcript, bytes: &[u8]) -> Result<State> {
    if transcript.proof(Role::Initiator).verify_slice(bytes).is_ok() {
        return Ok(State::Proven(Box::new(transcript.session(Role::Responder))));
    }
    Err(Error::Auth {
        reason: if bytes == REFUSAL {
            "the peer did not believe us: it has another secret, or is here for something else"
        } else {
            "the peer has another secret, or is here for something else"
        },
    })
}

fn preamble() -> [u8; PREAMBLE_BYTES] {
    let ([a, b, c, d], [low, high]) = (PREAMBLE_MAGIC, VERSION.to_le_bytes());
    [a, b, c, d, low, high, 0, 0]
}

fn check_preamble(bytes: &[u8]) -> Result<()> {
    let [a, b, c, d, low, high, reserved @ ..] = bytes else {
        return Err(Error::Auth { reason: "the first bytes are too few" });
    };
    if [*a, *b, *c, *d] != PREAMBLE_MAGIC {
        return Err(Error::Auth { reason: "the first bytes are not those of a unisono handshake" });
    }
    let got = u16::from_le_bytes([*low, *high]);
    if got != VERSION {
        return Err(Error::Version { expected: VERSION.into(), got: got.into() });
    }
    if reserved != [0, 0] {
        return Err(Error::Auth { reason: "the reserved bytes of the handshake are not zero" });
    }
    Ok(())
}

impl Own {
    fn with_peer(self, role: Role, peer: &[u8]) -> Transcript {
        let mut peer_nonce = [0; NONCE_BYTES];
        peer_nonce.copy_from_slice(peer);
        let (initiator_nonce, responder_nonce) = match role {
            Role::Initiator => (self.nonce, peer_nonce),
            Role::Responder => (peer_nonce, self.nonce),
        };
        Transcript { secret: self.secret, context: self.context, initiator_nonce, responder_nonce }
    }
}

impl Transcript {
    /// HMAC over everything that was said, for the side that proves.
    fn proof(&self, prover: Role) -> HmacSha256 {
        let mut mac = keyed(&self.derive(b"proof"));
        mac.update(match prover {
            Role::Initiator => b"initiator",
            Role::Responder => b"responder",
        });
        mac.update(&VERSION.to_le_bytes());
        mac.update(&self.initiator_nonce);
        mac.update(&self.responder_nonce);
        mac.update(&self.context);
        mac
    }

    /// A key that only holders of the secret have, different for each connection, context and use.
    fn derive(&self, usage: &[u8]) -> [u8; 32] {
        let salt = [self.initiator_nonce, self.responder_nonce].concat();
        let mut key = [0; 32];
        Hkdf::<Sha256>::new(Some(&salt), self.secret.expose())
            .expand_multi_info(&[b"unisono handshake 1 ", usage, b" ", &self.context], &mut key)
            .expect("HKDF-SHA256 gives up to 8160 bytes, and 32 were asked for");
        key
    }

    fn session(&self, role: Role) -> Session {
        let from_initiator = keyed(&self.derive(b"from initiator"));
        let from_responder = keyed(&self.derive(b"from responder"));
        let (ours, theirs) = match role {
            Role::Initiator => (from_initiator, from_responder),
            Role::Responder => (from_responder, from_initiator),
        };
        Session { sealer: Sealer::new(ours), opener: Opener::new(theirs) }
    }
}

fn keyed(key: &[u8; 32]) -> HmacSha256 {
    HmacSha256::new_from_slice(key).expect("HMAC takes keys of any length")
}

impl fmt::Debug for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Own(…)")
    }
}

impl fmt::Debug for Transcript {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Transcript(…)")
    }
}

#[cfg(test)]
mod tests;
