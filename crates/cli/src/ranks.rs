//! Ranks that the command starts for itself (to measure, to test), as processes of this program.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::sync::OnceLock;
use std::thread::JoinHandle;

use crate::Failure;
use crate::run::{Job, Rank};

/// The most that is kept of what a rank says on standard error.
const MAX_COMPLAINT_BYTES: u64 = 64 * 1024;

/// How this command is started again, where it is a part of another program: its beginning, and the arguments of this time.
static CONTAINED: OnceLock<(Vec<OsString>, Vec<OsString>)> = OnceLock::new();

/// Says that `program` starts this command again, and that these are its arguments now, behind its name.
pub(crate) fn be_contained(program: Vec<OsString>, arguments: Vec<OsString>) {
    // A second command of one process was started in the same way.
    let _ = CONTAINED.set((program, arguments));
}

/// How to start this program again as a rank: with the same arguments, and `--as-rank`.
pub(crate) fn own_arguments() -> Result<Vec<OsString>, Failure> {
    let mut command = own_program()?;
    match CONTAINED.get() {
        Some((_, arguments)) => command.extend_from_slice(arguments),
        None => command.extend(std::env::args_os().skip(1)),
    }
    command.push("--as-rank".into());
    Ok(command)
}

/// This program, as the beginning of a command.
pub(crate) fn own_program() -> Result<Vec<OsString>, Failure> {
    if let Some((program, _)) = CONTAINED.get() {
        return Ok(program.clone());
    }
    let program = std::env::current_exe().map_err(|error| {
        Failure::new(format!("this program cannot find itself to start the ranks: {error}"))
    })?;
    Ok(vec![program.into_os_string()])
}

/// Running ranks. Dropping it ends those that still run.
pub(crate) struct Ranks {
    ranks: Vec<Rank>,
    output: Option<File>,
    is_bound: bool,
    complaints: Vec<JoinHandle<String>>,
    /// The store lives as long as the ranks.
    _job: Job,
}

impl Ranks {
    /// Starts `count` ranks of `program`, each on a processor of its own if `bind` and there are enough.
    pub(crate) fn start(count: usize, program: Vec<OsString>, bind: bool) -> Result<Self, Failure> {
        let mut job = Job::new(count, program, None)?;
        let is_bound = bind && job.bind();
        let mut started =
            Self { is_bound, ranks: Vec::new(), output: None, complaints: Vec::new(), _job: job };
        for index in 0..count {
            let (rank, [output, errors]) = started._job.start(index)?;
            started.ranks.push(rank);
            let output = File::from(output.pipe);
            if index == 0 {
                started.output = Some(output);
            } else {
                started.complaints.push(collect(output));
            }
            started.complaints.push(collect(File::from(errors.pipe)));
        }
        Ok(started)
    }

    /// Whether each rank has a processor of its own.
    pub(crate) const fn is_bound(&self) -> bool {
        self.is_bound
    }

    /// Standard output of rank 0.
    pub(crate) fn take_output(&mut self) -> Result<File, Failure> {
        self.output.take().ok_or_else(|| Failure::new("no rank was started"))
    }

    /// Waits for all ranks; if any failed, how they ended and what they said.
    pub(crate) fn wait(mut self) -> Option<String> {
        let mut failed = Vec::new();
        for (index, rank) in self.ranks.iter_mut().enumerate() {
            match rank.child.wait() {
                Ok(status) if status.success() => {}
                Ok(status) => failed.push(format!("rank {index}: {status}")),
                Err(error) => failed.push(format!("rank {index}: {error}")),
            }
        }
        self.ranks.clear();
        let complaints = self.complaints.drain(..).filter_map(|thread| thread.join().ok());
        let said: String = complaints.collect();
        if failed.is_empty() {
            return None;
        }
        Some(format!("({})\n{}", failed.join(", "), said.trim_end()))
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            // One that has ended by itself needs no killing.
            let _ = rank.child.kill();
            let _ = rank.child.wait();
        }
    }
}

/// Reads all that comes from `pipe` and keeps the beginning.
fn collect(mut pipe: File) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        // What cannot be read any more is not missed: the exit status tells the rest.
        let _ = pipe.by_ref().take(MAX_COMPLAINT_BYTES).read_to_end(&mut kept);
        let _ = std::io::copy(&mut pipe, &mut std::io::sink());
        String::from_utf8_lossy(&kept).into_owned()
    })
}
