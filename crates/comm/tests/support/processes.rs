//! Worlds of processes: the test program starts itself once per rank, collects what they say, and ends those that are
//! left when one failed or time is up.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Set for a rank: `rank world_size seed store`.
const RANK: &str = "UNISONO_TEST_RANK";
/// Under the two minutes that a test may take.
const PATIENCE: Duration = Duration::from_secs(100);
/// How long the others have after one failed: to fail too, and say so.
const AFTER_A_FAILURE: Duration = Duration::from_secs(5);

/// What a process is told that is a rank.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Orders {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) seed: u64,
    pub(crate) store: PathBuf,
}

impl Orders {
    /// Ours, if this process is a rank.
    pub(crate) fn from_env() -> Option<Self> {
        let text = std::env::var(RANK).ok()?;
        let mut words = text.splitn(4, ' ');
        let mut number = || words.next().and_then(|word| word.parse::<u64>().ok()).expect(RANK);
        let (rank, world_size, seed) = (number() as usize, number() as usize, number());
        Some(Self { rank, world_size, seed, store: PathBuf::from(words.next().expect(RANK)) })
    }

    /// Tells the parent the results.
    pub(crate) fn report(&self, results: &[u64]) {
        let text: Vec<String> = results.iter().map(|result| format!("{result:016x}")).collect();
        writeln!(std::io::stdout(), "{}", text.join(" ")).expect("the parent reads");
    }
}

/// Processes that are ended when this goes.
struct Ranks(Vec<Child>);

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs a world of this program; what each rank reported.
///
/// # Errors
/// The output of the ranks that failed, or the ranks that did not end.
pub(crate) fn run(world_size: usize, seed: u64) -> Result<Vec<Vec<u64>>, String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let start = Instant::now();
    let mut ranks = Ranks(Vec::new());
    for rank in 0..world_size {
        let child = spawn(folder.path(), rank, world_size, seed).map_err(|error| error.to_string())?;
        ranks.0.push(child);
    }
    let mut statuses = vec![None; world_size];
    let mut deadline = PATIENCE;
    while statuses.contains(&None) && start.elapsed() < deadline {
        for (child, status) in ranks.0.iter_mut().zip(&mut statuses) {
            if status.is_none() {
                *status = child.try_wait().map_err(|error| error.to_string())?;
                if status.is_some_and(|status| !status.success()) {
                    deadline = deadline.min(start.elapsed() + AFTER_A_FAILURE);
                }
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    drop(ranks);
    let read = |rank, what| std::fs::read_to_string(output(folder.path(), rank, what)).unwrap_or_default();
    let mut complaints = String::new();
    for (rank, status) in statuses.iter().enumerate() {
        match status {
            Some(status) if status.success() => {}
            Some(status) => {
                complaints += &format!("rank {rank} ended with {status}: {}\n", read(rank, "err"))
            }
            None => complaints += &format!("rank {rank} did not end in time: {}\n", read(rank, "err")),
        }
    }
    if !complaints.is_empty() {
        return Err(format!("world of {world_size} processes, UNISONO_TEST_SEED={seed}\n{complaints}"));
    }
    let report = |rank| {
        let text = read(rank, "out");
        let words = text.split_whitespace().map(|word| u64::from_str_radix(word, 16));
        words.collect::<Result<_, _>>().map_err(|error| format!("rank {rank} reported `{text}`: {error}"))
    };
    (0..world_size).map(report).collect()
}

fn spawn(folder: &Path, rank: usize, world_size: usize, seed: u64) -> std::io::Result<Child> {
    let store = folder.join("store");
    Command::new(std::env::current_exe()?)
        .env(RANK, format!("{rank} {world_size} {seed} {}", store.display()))
        .stdin(Stdio::null())
        .stdout(File::create(output(folder, rank, "out"))?)
        .stderr(File::create(output(folder, rank, "err"))?)
        .spawn()
}

fn output(folder: &Path, rank: usize, what: &str) -> PathBuf {
    folder.join(format!("{rank}.{what}"))
}
