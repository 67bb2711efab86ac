//! A proxy between a rank and the store that flips one bit on the way.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

/// Forwards all connections; flips a bit of byte `at`, counted over all of them, of one direction.
pub(crate) struct TamperingProxy {
    pub(crate) address: SocketAddr,
}

impl TamperingProxy {
    /// `direction` 0 is towards the store. It lives as long as the test.
    pub(crate) fn start(target: SocketAddr, direction: usize, at: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let mut passed = [0, 0];
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(target) else { return };
                // One connection after the other: a client of ours has one at a time while it meets.
                let flip = |way| if way == direction { at.checked_sub(passed[way]) } else { None };
                let (there, back) = (flip(0), flip(1));
                let counts = thread::scope(|scope| {
                    let there = scope.spawn(|| forward(&client, &server, there));
                    [forward(&server, &client, back), there.join().unwrap()]
                });
                passed = [passed[0] + counts[1], passed[1] + counts[0]];
            }
        });
        Self { address }
    }
}

/// Forwards until an end closes; the number of bytes that passed.
fn forward(mut from: &TcpStream, mut to: &TcpStream, flip: Option<usize>) -> usize {
    let (mut bytes, mut passed) = ([0; 1024], 0);
    while let Ok(got @ 1..) = from.read(&mut bytes) {
        if let Some(at) = flip
            && (passed..passed + got).contains(&at)
        {
            bytes[at - passed] ^= 0x10;
        }
        passed += got;
        if to.write_all(&bytes[..got]).is_err() {
            break;
        }
    }
    // Whichever end is still there learns that it is over.
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    passed
}
