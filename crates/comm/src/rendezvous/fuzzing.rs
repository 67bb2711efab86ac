//! A store in which others have written what they liked, and a rank that comes to meet there.

use std::time::Duration;

use unisono_core::Member;
use unisono_core::hello::{HostIdentity, PROTOCOL_VERSION};

use super::*;
use crate::store::MemoryStore;

fn hello(rank: usize) -> Hello {
    Hello {
        version: PROTOCOL_VERSION,
        job: "job".to_owned(),
        generation: 1,
        member: Member::new(rank, 2).unwrap(),
        host: HostIdentity { name: "a".to_owned(), boot_id: "boot".to_owned(), network_namespace: 7 },
        pid: 100,
        endpoint: [rank as u8; 16],
        devices: Vec::new(),
        options: vec![1],
        options_text: "order=fixed".to_owned(),
    }
}

/// Where the values lie: all that a rank reads.
const KEYS: [&str; 8] = [
    "job/1/host/boot-7",
    "job/1/hosts",
    "job/1/table/boot-7",
    "job/1/world",
    "job/1/rank/0",
    "job/generation",
    "job/1/failed/1",
    "job/1/host/other-7",
];

/// One value for each of the keys; an empty one is not there. Ranks 0 and 1 of two meet.
///
/// # Panics
/// If a rank gets a table in which it is not itself.
pub fn meeting(values: &[&[u8]]) {
    for rank in 0..2 {
        let store = MemoryStore::new();
        let now = Deadline::after(Duration::ZERO);
        for (key, value) in KEYS.iter().zip(values).filter(|(_, value)| !value.is_empty()) {
            store.set(&format!("unisono/{key}"), value, now).unwrap();
        }
        store.set("unisono/job/1/all", b"1", now).unwrap();
        let hello = hello(rank);
        let rendezvous = Rendezvous::new(&store, &hello, now);
        match rendezvous.meet() {
            Ok(table) => {
                assert_eq!(*table.hello(rank), hello);
                // Whoever says nothing is waited for.
                if values.get(6).is_none_or(|told| told.is_empty()) {
                    return;
                }
                let pid = table.hello(1 - rank).pid;
                let lost = unisono_node::Lost::SocketClosed;
                let error = Error::Node(unisono_node::Error::PeerLost { rank: 1 - rank, pid, lost });
                drop(rendezvous.first_cause(error, &table).to_string());
            }
            Err(error) => drop(error.to_string()),
        }
        drop(rendezvous.agree_on_secret(&Secret::new([1; 32])));
    }
}

/// The store as the other rank leaves it, and a table.
pub fn meeting_seeds() -> Vec<Vec<Vec<u8>>> {
    let list = |ranks: &[usize]| {
        let mut list = Vec::new();
        for rank in ranks {
            let bytes = wire::encode_body(&hello(*rank)).unwrap();
            list.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            list.extend_from_slice(&bytes);
        }
        list
    };
    let one = wire::encode_body(&hello(1)).unwrap();
    let table = WorldTable::merge([hello(0), hello(1)]).unwrap();
    let table = wire::encode_body(&Ok::<_, String>(table)).unwrap();
    let refused = wire::encode_body(&Err::<WorldTable, _>("world size differs")).unwrap();
    let cause = Cause::Aborted { rank: 1, reason: "why".to_owned() }.to_bytes(1000);
    vec![
        vec![list(&[1]), b"boot-7\n".to_vec(), table, one, Vec::new(), b"1".to_vec(), cause],
        vec![
            list(&[0]),
            b"boot-7\nother-7\n".to_vec(),
            refused,
            Vec::new(),
            Vec::new(),
            b"0".to_vec(),
            Vec::new(),
            list(&[1]),
        ],
    ]
}
