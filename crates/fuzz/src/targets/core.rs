//! The decoders of `unisono-core`, all of which are public.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};
use unisono_core::auth::{Handshake, Opened, Role, Session};
use unisono_core::call::{CallHeader, HEADER_WORDS, Kind};
use unisono_core::device::Table;
use unisono_core::fused::NormOutput;
use unisono_core::hello::{Hello, HostIdentity, PROTOCOL_VERSION, WorldTable};
use unisono_core::select::Thresholds;
use unisono_core::settings::{Settings, unknown_names};
use unisono_core::topology::Topology;
use unisono_core::tuning::Tuning;
use unisono_core::wire::{Header, decode_body, encode_body};
use unisono_core::{DType, Member, ReduceOp, Secret, UniqueId};

const SECRET: Secret = Secret::new([7; 32]);

/// The 128 bytes of an id, as they are and with a checksum that fits; and the same as text.
pub(super) fn unique_id(bytes: &[u8]) {
    let mut fitting = bytes.to_vec();
    if let Some((content, checksum)) = fitting.split_at_mut_checked(120)
        && checksum.len() == 8
    {
        checksum.copy_from_slice(&Sha256::digest(content)[..8]);
    }
    for bytes in [bytes, &fitting] {
        if let Ok(id) = UniqueId::from_bytes(bytes) {
            assert_eq!(id.to_bytes(), bytes);
            assert_eq!(UniqueId::from_text(&id.to_text()).unwrap(), id);
        }
    }
    if let Ok(id) = UniqueId::from_text(&String::from_utf8_lossy(bytes)) {
        assert!(String::from_utf8_lossy(bytes).trim().eq_ignore_ascii_case(&id.to_text()));
    }
}

pub(super) fn unique_id_seeds() -> Vec<Vec<u8>> {
    let id = |address: &str| UniqueId::new(address.parse().unwrap(), [0xab; 16], SECRET).unwrap();
    let (four, six) = (id("10.0.0.5:29500"), id("[fe80::1]:7"));
    vec![four.to_bytes().to_vec(), six.to_bytes().to_vec(), six.to_text().into_bytes()]
}

/// What a rank says of itself.
pub(super) fn hello(bytes: &[u8]) {
    let Ok(hello) = decode_body::<Hello>(bytes) else { return };
    assert!(hello.member.rank() < hello.member.world_size());
    assert_eq!(decode_body::<Hello>(&encode_body(&hello).unwrap()).unwrap(), hello);
    assert!(hello.host.key().len() <= 64 + 1 + 16);
    if let Err(error) = hello.check_fits(&some_hello(0, 2)) {
        drop(error.to_string());
    }
    drop(WorldTable::merge([hello, some_hello(0, 2)]));
}

pub(super) fn hello_seeds() -> Vec<Vec<u8>> {
    vec![encode_body(&some_hello(0, 2)).unwrap(), encode_body(&some_hello(70, 5000)).unwrap()]
}

/// The table that the lowest rank of a host wrote for the others.
pub(super) fn world_table(bytes: &[u8]) {
    let Ok(table) = decode_body::<WorldTable>(bytes) else { return };
    let Ok(table) = table.checked() else { return };
    let ranks = table.hellos().len();
    assert!((0..ranks).all(|rank| table.hello(rank).member.rank() as usize == rank));
    let again = decode_body::<WorldTable>(&encode_body(&table).unwrap()).unwrap();
    assert_eq!((again.hash(), &again), (table.hash(), &table));
    let topology = Topology::new(&table);
    assert_eq!(topology.hosts().iter().map(|host| host.ranks.len()).sum::<usize>(), ranks);
    for rank in 0..ranks {
        assert_eq!(topology.local_ranks(rank)[topology.local_rank(rank)], rank);
    }
}

pub(super) fn world_table_seeds() -> Vec<Vec<u8>> {
    let table = |ranks: usize| WorldTable::merge((0..ranks).map(|rank| some_hello(rank, ranks))).unwrap();
    [1, 2, 5].iter().map(|ranks| encode_body(&table(*ranks)).unwrap()).collect()
}

fn some_hello(rank: usize, world_size: usize) -> Hello {
    Hello {
        version: PROTOCOL_VERSION,
        job: "job".to_owned(),
        generation: 1,
        member: Member::new(rank, world_size).unwrap(),
        host: HostIdentity {
            name: format!("host{}", rank % 2),
            boot_id: format!("boot-{}", rank % 2),
            network_namespace: 7,
        },
        pid: 4121,
        endpoint: [rank as u8; 16],
        devices: Vec::new(),
        options: vec![1, 2],
        options_text: "order=fixed".to_owned(),
    }
}

/// The header of a frame, under several caps.
pub(super) fn frame_header(bytes: &[u8]) {
    for cap in [0, 1000, usize::MAX] {
        match Header::parse(bytes, cap) {
            Ok(header) => {
                assert_eq!(header.to_bytes(), bytes[..Header::BYTES]);
                assert!(header.length as usize <= cap);
            }
            Err(error) => drop(error.to_string()),
        }
    }
}

pub(super) fn frame_header_seeds() -> Vec<Vec<u8>> {
    let header = |kind, length, sequence| Header { kind, length, sequence }.to_bytes().to_vec();
    vec![header(1, 0, 0), header(2, 1000, 9), header(u16::MAX, u32::MAX, u64::MAX)]
}

/// A stream of sealed frames: only what the peer sealed, in its order, is a frame.
pub(super) fn sealed_frames(bytes: &[u8]) {
    let (mut sender, mut receiver) = sessions();
    receiver.opener.set_cap(1 << 16);
    let mut rest = bytes;
    loop {
        match receiver.opener.open(rest) {
            Ok(Opened::Frame { kind, body, consumed }) => {
                let mut genuine = Vec::new();
                sender.sealer.seal(kind, &rest[body], &mut genuine).unwrap();
                assert_eq!(genuine, rest[..consumed], "nobody sealed this");
                rest = &rest[consumed..];
            }
            Ok(Opened::NeedMore(bytes)) => {
                assert!(bytes > rest.len() && bytes <= (1 << 16) + 100, "{bytes}");
                return;
            }
            Err(error) => {
                assert_eq!(receiver.opener.open(&[]), Err(error), "a failed opener stays failed");
                return;
            }
        }
    }
}

pub(super) fn sealed_frames_seeds() -> Vec<Vec<u8>> {
    let (mut sender, _) = sessions();
    let mut frames = Vec::new();
    for (kind, body) in [(1, &b"hello"[..]), (2, b""), (3, &[9; 200])] {
        sender.sealer.seal(kind, body, &mut frames).unwrap();
    }
    vec![frames.clone(), frames[..29 + 16].to_vec()]
}

/// Both ends of a connection whose nonces are known, so that genuine bytes can be written down.
fn sessions() -> (Session, Session) {
    let (mut initiator, mut responder) = (initiator(), responder());
    responder.on_input(&initiator.poll_output().unwrap()).unwrap();
    initiator.on_input(&responder.poll_output().unwrap()).unwrap();
    responder.on_input(&initiator.poll_output().unwrap()).unwrap();
    (initiator.finish().unwrap(), responder.finish().unwrap())
}

fn initiator() -> Handshake {
    Handshake::new(Role::Initiator, &SECRET, b"fuzz", [1; 32])
}

fn responder() -> Handshake {
    Handshake::new(Role::Responder, &SECRET, b"fuzz", [2; 32])
}

/// The bytes of a peer in a handshake, of either role: nobody is believed who does not know the secret. As nonces are
/// fixed here, one proof is right for each opening, and whoever has another is not believed.
pub(super) fn handshake(bytes: &[u8]) {
    for (mut handshake, role) in [(initiator(), Role::Initiator), (responder(), Role::Responder)] {
        let (mut rest, mut proof) = (bytes, &[][..]);
        let mut opening = handshake.poll_output();
        while handshake.wants() > 0 && handshake.wants() <= rest.len() {
            let (message, after) = rest.split_at(handshake.wants());
            if let Err(error) = handshake.on_input(message) {
                assert_eq!(handshake.on_input(message), Err(error), "a failed handshake stays failed");
                break;
            }
            let answer = handshake.poll_output();
            opening = opening.or_else(|| Some(message.to_vec()));
            proof = if role == Role::Initiator { &message[message.len() - 32..] } else { message };
            drop(answer);
            rest = after;
        }
        if handshake.finish().is_none() {
            continue;
        }
        let expected = match role {
            Role::Initiator => challenge_with(&bytes[8..40], &opening.unwrap()),
            Role::Responder => proof_of(&opening.unwrap()),
        };
        assert_eq!(proof, expected, "a proof that nobody gave was believed");
    }
}

/// The proof of a responder with this nonce, to this opening.
fn challenge_with(nonce: &[u8], opening: &[u8]) -> Vec<u8> {
    let mut responder = Handshake::new(Role::Responder, &SECRET, b"fuzz", nonce.try_into().unwrap());
    responder.on_input(opening).unwrap();
    responder.poll_output().unwrap()[40..].to_vec()
}

/// The proof of the initiator that sent this opening, to [`responder`].
fn proof_of(opening: &[u8]) -> Vec<u8> {
    let nonce = opening[8..].try_into().unwrap();
    let mut initiator = Handshake::new(Role::Initiator, &SECRET, b"fuzz", nonce);
    let mut responder = responder();
    responder.on_input(&initiator.poll_output().unwrap()).unwrap();
    initiator.on_input(&responder.poll_output().unwrap()).unwrap();
    initiator.poll_output().unwrap()
}

pub(super) fn handshake_seeds() -> Vec<Vec<u8>> {
    let (mut initiator, mut responder) = (initiator(), responder());
    let opening = initiator.poll_output().unwrap();
    responder.on_input(&opening).unwrap();
    let challenge = responder.poll_output().unwrap();
    initiator.on_input(&challenge).unwrap();
    vec![[opening, initiator.poll_output().unwrap()].concat(), challenge]
}

/// A call as a peer published it.
pub(super) fn call_header(bytes: &[u8]) {
    let mut words = [0; HEADER_WORDS];
    for (word, chunk) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*chunk);
    }
    let Some(header) = CallHeader::from_words(&words) else { return };
    drop(header.describe(words[6], words[7] as u32));
    let again = header.to_words();
    assert_eq!(CallHeader::from_words(&again).map(|header| header.to_words()), Some(again));
}

pub(super) fn call_header_seeds() -> Vec<Vec<u8>> {
    let op = ReduceOp::Sum;
    let kinds = [
        Kind::Barrier,
        Kind::AllReduce { op },
        Kind::Broadcast { root: 3 },
        Kind::Reduce { op, root: 1 },
        Kind::AllGatherV,
        Kind::BroadcastMulti { root: 0, buffer: 2 },
        Kind::AllToAllV,
        Kind::AllToAllCounted,
        Kind::AllReduceRmsNorm { hidden: 8, epsilon: 1e-5, output: NormOutput::Fp8, is_in_place: true },
    ];
    let header =
        |kind| CallHeader { dtype: Some(DType::BF16), count: 4096, parts: 3, ..CallHeader::bare(kind) };
    kinds
        .iter()
        .map(|kind| header(*kind).to_words().iter().flat_map(|word| word.to_le_bytes()).collect())
        .collect()
}

/// Lines of `NAME=value`, as an environment.
pub(super) fn settings(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let pairs: Vec<(&str, &str)> = text.lines().filter_map(|line| line.split_once('=')).collect();
    let lookup =
        |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
    match Settings::from_lookup(&lookup) {
        Ok(settings) => drop(settings.agreement_bytes(None)),
        Err(error) => drop(error.to_string()),
    }
    let unknown = unknown_names(pairs.iter().map(|(name, _)| *name));
    assert!(unknown.iter().all(|(name, _)| name.starts_with("UNISONO_")));
}

pub(super) fn settings_seeds() -> Vec<Vec<u8>> {
    let texts = [
        "UNISONO_TIMEOUT=600s\nUNISONO_INIT_TIMEOUT=1m\nUNISONO_LIVENESS=300ms\nUNISONO_WARN_AFTER=never",
        "UNISONO_ALGORITHM=two-shot\nUNISONO_ORDER=rank\nUNISONO_REQUIRE=auth\nUNISONO_SPIN=5us\nUNISONO_LOG=debug",
        "UNISONO_TIMOUT=1h\nUNISONO_STORE=tcp://[::1]:5\nUNISONO_INTERFACE=eth0\nUNISONO_SPIN=auto\nHOME=/",
    ];
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

/// A tuning file, as it is and with a checksum that fits.
pub(super) fn tuning(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let above = text.find("checksum ").map_or(&*text, |at| &text[..at]);
    let checksum: String = Sha256::digest(above).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    for text in [&*text, &format!("{above}checksum {checksum}\n")] {
        match Tuning::parse(text) {
            Ok(tuning) => {
                let again = Tuning::parse(&tuning.to_text(&[])).unwrap();
                assert_eq!(again, tuning);
                assert!(again.check_machine("another").is_err() || tuning.check_machine("another").is_ok());
            }
            Err(error) => drop(error.to_string()),
        }
    }
}

pub(super) fn tuning_seeds() -> Vec<Vec<u8>> {
    let worlds = [2, 3, 1024].map(|ranks| (ranks, Thresholds::for_world(ranks)));
    let some = Tuning::new("a processor, 8 processors", worlds.into());
    let none = Tuning::new("", BTreeMap::new());
    let tables = [2, 16].map(|ranks| (ranks, Table::built_in(ranks)));
    let on_gpus = none.clone().with_gpus("a device", tables.into());
    let texts = [some.to_text(&["a note".to_owned()]), none.to_text(&[]), on_gpus.to_text(&[])];
    texts.map(String::into_bytes).to_vec()
}
