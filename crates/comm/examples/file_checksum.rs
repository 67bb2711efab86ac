//! All-reduces the bytes of a file across the ranks of a job: each rank takes its share, all get the same checksum.
//!
//! ```text
//! unisono run -n 4 -- target/release/examples/file_checksum README.md
//! torchrun --nproc-per-node 4 --no-python target/release/examples/file_checksum README.md
//! ```
//! Every rank reads its own part of the file, sums it into 256 counters (how often each byte value occurs), and the
//! counters of all ranks are added up. The checksum is a hash of the sums, so it is the same whatever the number of
//! ranks. With no launcher around it, the program is a world of one rank.

#![allow(clippy::print_stdout, clippy::print_stderr)] // a program that people run

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::process::ExitCode;

use unisono::{Communicator, Error, Operations, ReduceOp};

fn main() -> ExitCode {
    let Some(path) = std::env::args().nth(1) else {
        eprintln!("usage: file_checksum FILE, for example: unisono run -n 4 -- file_checksum README.md");
        return ExitCode::from(2);
    };
    match run(&path) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(path: &str) -> Result<String, Box<dyn std::error::Error>> {
    let rank = match Communicator::from_env() {
        Err(Error::LaunchNothing) => Communicator::threads(1)?.remove(0),
        other => other?,
    };
    let mut histogram = count(path, rank.rank() as u64, rank.world_size() as u64)?;
    rank.all_reduce(&mut histogram, ReduceOp::Sum)?;
    let bytes: u64 = histogram.iter().sum();
    let line = format!(
        "rank {} of {}: {bytes} bytes, checksum {:016x}",
        rank.rank(),
        rank.world_size(),
        hash(&histogram)
    );
    rank.destroy()?;
    Ok(line)
}

/// How often each byte value occurs in this rank's share of the file.
fn count(path: &str, rank: u64, world_size: u64) -> std::io::Result<Vec<u64>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let (start, end) = (length * rank / world_size, length * (rank + 1) / world_size);
    file.seek(SeekFrom::Start(start))?;
    let mut share = Vec::new();
    file.take(end - start).read_to_end(&mut share)?;
    let mut histogram = vec![0; 256];
    for byte in share {
        histogram[usize::from(byte)] += 1;
    }
    Ok(histogram)
}

/// FNV-1a over the counters.
fn hash(histogram: &[u64]) -> u64 {
    let bytes = histogram.iter().flat_map(|count| count.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}
