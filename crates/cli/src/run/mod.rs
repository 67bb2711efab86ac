//! `unisono run`: start a program as the ranks of one job on this host, and stay with it until all have ended.
//!
//! The main thread is a loop over descriptors: one per rank that tells of its end, and one with the signals to hand
//! on. What to do is decided by [`policy::Policy`], which knows neither processes nor clocks. Another thread writes the
//! output ([`writer`]), and one more serves the store. Every rank is the leader of a process group and dies with us.

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::Signal;
use unisono::settings;

use crate::output::Target;
use crate::{Common, Failure};
use policy::{Action, Ended, Note, OnFailure, Policy, Rules};
use recordings::Recordings;
use signals::Signals;
pub(crate) use spawn::{Job, Rank};

use writer::Writer;

mod lines;
mod policy;
mod recordings;
mod report;
mod secret;
mod signals;
mod spawn;
mod writer;

/// The most ranks that one `unisono run` starts.
const MAX_RANKS: usize = 1024;
/// How long a timed-out job waits for a reader that does not read our output.
const OUTPUT_WAIT: Duration = Duration::from_secs(5);

/// The arguments of `unisono run`.
#[derive(Debug, Args)]
#[command(
    override_usage = "unisono run -n <N> [OPTIONS] -- <PROGRAM> [ARGS]...\n       for example: unisono run -n 4 -- python train.py",
    after_help = "Each rank gets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT (a free \
                  port for the program's own use), and UNISONO_STORE, UNISONO_JOB and UNISONO_SECRET_FD, with which \
                  the ranks find each other. Rank 0 reads the input, unless it is a terminal.\n\n\
                  Exit code: that of the first rank that failed (128 + signal if it was killed), 124 after --timeout, \
                  126 or 127 if PROGRAM cannot be started, 125 if something else went wrong before that."
)]
pub(crate) struct Arguments {
    /// Number of ranks
    #[arg(short = 'n', long = "ranks", value_name = "N", value_parser = rank_count)]
    ranks: usize,
    /// End the job after this time, with exit code 124 [for example 90s, 10m, 2h]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    timeout: Option<Duration>,
    /// What a failed rank means for the others
    #[arg(long, value_name = "WHAT", default_value = "stop")]
    on_failure: OnFailure,
    /// How long the others have to report and end by themselves after a failure, before they get SIGTERM
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "5s")]
    grace: Duration,
    /// Bind each rank to a processor of its own, if there are enough
    #[arg(long)]
    bind: bool,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
    pub(crate) program: Vec<OsString>,
}

fn rank_count(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|count| (1..=MAX_RANKS).contains(count));
    count.ok_or_else(|| {
        format!("a job has 1 to {MAX_RANKS} ranks, for example: unisono run -n 4 -- python train.py")
    })
}

fn duration(text: &str) -> Result<Duration, String> {
    settings::parse_duration(text)
        .ok_or_else(|| format!("expected {}", settings::ValueKind::Duration.expected()))
}

/// Runs the job and answers the exit code.
pub(crate) fn execute(arguments: Arguments, common: &Common) -> Result<u8, Failure> {
    // Before any thread starts, so that none of them receives what is to be handed on.
    let signals =
        Signals::block().map_err(|error| Failure::new(format!("signals cannot be blocked: {error}")))?;
    let rules = Rules {
        world_size: arguments.ranks,
        grace: arguments.grace,
        timeout: arguments.timeout,
        on_failure: arguments.on_failure,
    };
    let mut job = Job::new(arguments.ranks, arguments.program, Some(signals.mask_before()))?;
    if arguments.bind && !job.bind() {
        tracing::warn!("there are fewer processors than ranks; none is bound");
    }
    tracing::info!(job = job.name, store = %job.store.address(), ranks = job.world_size, "starting");

    let started = Instant::now();
    let (ranks, sources) = start_all(&job)?;
    let pids: Vec<i32> = ranks.iter().map(|rank| rank.pid.as_raw_pid()).collect();
    let mut supervisor = match Writer::start(sources, job.world_size) {
        Ok(writer) => Supervisor {
            ranks: ranks.into_iter().map(Some).collect(),
            policy: Policy::new(rules),
            signals,
            writer,
            recordings: Recordings::new(&job.name),
            started,
            pids,
            quiet: common.quiet,
        },
        Err(error) => {
            kill_all(ranks);
            return Err(Failure::new(format!("the output of the ranks cannot be read: {error}")));
        }
    };
    supervisor.watch().map_err(|error| Failure::new(format!("the ranks cannot be watched: {error}")))?;
    supervisor.conclude(&job.name, common.json.as_ref())
}

fn start_all(job: &Job) -> Result<(Vec<Rank>, Vec<writer::Source>), Failure> {
    let (mut ranks, mut sources) =
        (Vec::with_capacity(job.world_size), Vec::with_capacity(2 * job.world_size));
    for rank in 0..job.world_size {
        match job.start(rank) {
            Ok((started, pipes)) => {
                tracing::debug!(rank, pid = started.pid.as_raw_pid(), "started");
                ranks.push(started);
                sources.extend(pipes);
            }
            Err(failure) => {
                kill_all(ranks);
                return Err(failure);
            }
        }
    }
    Ok((ranks, sources))
}

/// Ends ranks of a job that did not come to be.
fn kill_all(ranks: Vec<Rank>) {
    for mut rank in ranks {
        let _ = rustix::process::kill_process_group(rank.pid, Signal::KILL);
        let _ = rank.child.wait();
    }
}

struct Supervisor {
    /// `None` once the rank has ended.
    ranks: Vec<Option<Rank>>,
    policy: Policy,
    signals: Signals,
    writer: Writer,
    recordings: Recordings,
    started: Instant,
    pids: Vec<i32>,
    quiet: bool,
}

impl Supervisor {
    /// Returns when every rank has ended.
    fn watch(&mut self) -> io::Result<()> {
        loop {
            while let Some(action) = self.policy.poll(self.started.elapsed()) {
                self.act(action);
            }
            if self.policy.is_over() {
                return Ok(());
            }
            self.recordings.look_in_time(self.started.elapsed(), living(&self.ranks));
            let ended = self.wait()?;
            self.collect(ended)?;
            while let Some(signal) = self.signals.next()? {
                self.on_signal(signal);
            }
        }
    }

    /// Waits for an end, a signal or the time of the next action; the ranks that ended.
    fn wait(&self) -> io::Result<Vec<usize>> {
        let living: Vec<(usize, &Rank)> =
            self.ranks.iter().enumerate().filter_map(|(index, rank)| Some((index, rank.as_ref()?))).collect();
        let files = living.iter().map(|(_, rank)| rank.pidfd.as_fd()).chain([self.signals.as_fd()]);
        let mut polled: Vec<PollFd<'_>> =
            files.map(|file| PollFd::from_borrowed_fd(file, PollFlags::IN)).collect();
        let look = self.recordings.next_look();
        let wake = self.policy.next_wake().map_or(look, |wake| wake.min(look));
        match poll(&mut polled, Some(&timespec(wake.saturating_sub(self.started.elapsed())))) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Vec::new()),
            Err(errno) => return Err(errno.into()),
        }
        let ended = living.iter().zip(&polled).filter(|(_, polled)| !polled.revents().is_empty());
        Ok(ended.map(|((index, _), _)| *index).collect())
    }

    /// Takes the exit status of ranks that ended and tells the policy, those killed by a signal first.
    fn collect(&mut self, ended: Vec<usize>) -> io::Result<()> {
        let now = self.started.elapsed();
        let mut ends = Vec::with_capacity(ended.len());
        for index in ended {
            let Some(rank) = self.ranks[index].as_mut() else { continue };
            let how = peek(rank)?;
            // While its status is not taken, its number cannot belong to a stranger. What a failed or ended rank
            // started (data loaders) must not keep the devices busy.
            if how.is_failure() || self.policy.is_stopping() {
                let _ = rustix::process::kill_process_group(rank.pid, Signal::KILL);
            }
            rank.child.wait()?;
            self.ranks[index] = None;
            ends.push((how, index));
        }
        ends.sort_unstable();
        for (how, index) in ends {
            tracing::debug!(rank = index, ?how, "ended");
            self.policy.on_exit(index, how, now);
        }
        Ok(())
    }

    fn on_signal(&mut self, signal: i32) {
        if signal != libc::SIGTSTP {
            self.policy.on_signal(signal, self.started.elapsed());
            return;
        }
        // Ctrl-Z: the ranks stop with us and go on with us.
        self.send(libc::SIGTSTP);
        let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::STOP);
        self.send(libc::SIGCONT);
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send(signal) => self.send(signal),
            Action::Announce(note) => {
                let forwarded = matches!(note, Note::Forwarded { .. });
                if !(self.quiet && forwarded) {
                    self.writer.say(&report::announcement(note, &self.policy, &self.pids));
                }
                if matches!(note, Note::FirstFailure { .. } | Note::TimedOut) {
                    self.recordings.look(living(&self.ranks));
                }
                if note == Note::TimedOut {
                    self.recordings.why().iter().for_each(|paragraph| self.writer.say(paragraph));
                }
            }
        }
    }

    /// Sends to every living rank and what it started.
    fn send(&self, signal: i32) {
        let Some(signal) = Signal::from_named_raw(signal) else { return };
        for rank in self.ranks.iter().flatten() {
            // Fails only if the rank has just ended, which the next wait tells.
            let _ = rustix::process::kill_process_group(rank.pid, signal);
        }
    }

    /// Lets the writer finish, writes the report, and answers the exit code.
    fn conclude(self, job: &str, json: Option<&Target>) -> Result<u8, Failure> {
        let code = report::exit_code(&self.policy);
        let mut lines = report::summary(&self.policy);
        if !lines.is_empty() {
            lines.splice(0..0, self.recordings.sentence(self.pids.len()));
        }
        let result = match json {
            Some(_) => {
                let last_calls = self.recordings.last_calls(self.pids.len());
                let report =
                    report::Report::new(job, &self.policy, &self.pids, last_calls, self.started.elapsed());
                let text = serde_json::to_string_pretty(&report);
                text.map_err(|error| Failure::new(format!("the report cannot be written as JSON: {error}")))?
                    + "\n"
            }
            None => String::new(),
        };
        let to_stdout = matches!(json, Some(Target::Stdout));
        self.writer.finish(&lines, if to_stdout { result.clone().into_bytes() } else { Vec::new() });
        if let Some(Target::File(path)) = json {
            std::fs::write(path, &result).map_err(|error| {
                Failure::new(format!("the report cannot be written to {}: {error}", path.display()))
            })?;
        }
        if self.output_is_done() {
            self.writer.join();
        }
        Ok(code)
    }

    /// Waits for the writer, who waits for whoever reads us: until a signal comes, or not long if the time was over
    /// anyway.
    fn output_is_done(&self) -> bool {
        let wait = self.policy.timed_out().then(|| timespec(OUTPUT_WAIT));
        loop {
            let mut polled = [
                PollFd::from_borrowed_fd(self.writer.done(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
            ];
            match poll(&mut polled, wait.as_ref()) {
                Err(Errno::INTR) => {}
                Err(_) => return false,
                Ok(_) => return !polled[0].revents().is_empty(),
            }
        }
    }
}

/// The processes of the ranks that have not ended.
fn living(ranks: &[Option<Rank>]) -> impl Iterator<Item = u32> {
    ranks.iter().flatten().map(|rank| rank.pid.as_raw_pid().unsigned_abs())
}

/// How the rank ended, leaving its status in place.
fn peek(rank: &Rank) -> io::Result<Ended> {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    let status = waitid(WaitId::PidFd(rank.pidfd.as_fd()), options)?;
    let status = status.ok_or_else(|| io::Error::other("a process that ended has no exit status"))?;
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Ok(Ended::Code(code)),
        (None, Some(signal)) => Ok(Ended::Signal(signal)),
        (None, None) => Err(io::Error::other("a process that ended has neither exit code nor signal")),
    }
}

fn timespec(span: Duration) -> Timespec {
    // Rounded up to a millisecond, so that the time has come when the wait is over.
    let span = span.saturating_add(Duration::from_millis(1));
    Timespec {
        tv_sec: i64::try_from(span.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(span.subsec_nanos()),
    }
}
