//! Ranks as processes: started, watched by their output, and gone when the test is over, however it ends.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use unisono::UniqueId;

use super::traces::Traces;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a world is started.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) part: &'static str,
    pub(crate) size: usize,
    pub(crate) store: UniqueId,
    pub(crate) job: String,
    /// Further settings of all ranks, as [`super::parts::Part`] reads them.
    pub(crate) settings: Vec<(&'static str, String)>,
}

impl Setup {
    pub(crate) fn new(part: &'static str, size: usize, store: UniqueId) -> Self {
        let job = format!("faults-{}-{}", std::process::id(), super::now_ns());
        Self { part, size, store, job, settings: Vec::new() }
    }

    pub(crate) fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        self.settings.push((name, value.to_string()));
        self
    }

    /// The process of `rank`.
    pub(crate) fn command(&self, rank: usize) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        self.tell(&mut command, rank);
        command
    }

    /// Puts what `rank` must know into the environment of `command`.
    pub(crate) fn tell(&self, command: &mut Command, rank: usize) {
        // What is set around the test is not for its ranks.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("UNISONO_") {
                command.env_remove(name);
            }
        }
        command
            .env("FAULTS_PART", self.part)
            .env("FAULTS_RANK", rank.to_string())
            .env("FAULTS_SIZE", self.size.to_string())
            .env("FAULTS_STORE", self.store.to_text())
            .env("FAULTS_JOB", &self.job)
            .envs(self.settings.iter().map(|(name, value)| (*name, value)));
    }

    /// Starts all ranks.
    pub(crate) fn start(&self) -> World {
        World::start((0..self.size).map(|rank| self.command(rank)), self.job.clone())
    }
}

/// What a rank said last.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    /// When, in the time of [`super::now_ns`].
    pub(crate) at_ns: u64,
    /// Name of the error's variant.
    pub(crate) variant: String,
    /// The ranks that it names as dead, missing or left.
    pub(crate) names: Vec<usize>,
    pub(crate) sentence: String,
}

impl Failure {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.strip_prefix("failed\t")?.splitn(4, '\t');
        Some(Self {
            at_ns: fields.next()?.parse().ok()?,
            variant: fields.next()?.to_owned(),
            names: fields.next()?.split_whitespace().filter_map(|rank| rank.parse().ok()).collect(),
            sentence: fields.next()?.to_owned(),
        })
    }
}

/// One rank's process and what it has said so far.
pub(crate) struct Rank {
    child: Child,
    pub(crate) pid: u32,
    pub(crate) output: Vec<String>,
    pub(crate) errors: Vec<String>,
    open_streams: usize,
    pub(crate) status: Option<ExitStatus>,
}

impl Rank {
    pub(crate) fn failure(&self) -> Option<Failure> {
        self.output.iter().find_map(|line| Failure::parse(line))
    }

    /// What stands behind `name ` in its output.
    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        self.output.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
    }

    pub(crate) fn said(&self, line: &str) -> bool {
        self.output.iter().any(|said| said == line)
    }

    fn has_ended(&self) -> bool {
        self.status.is_some() && self.open_streams == 0
    }
}

enum Said {
    Output(String),
    Error(String),
    End,
}

/// Processes of one test. Dropping it kills what still runs.
pub(crate) struct World {
    pub(crate) ranks: Vec<Rank>,
    pub(crate) job: String,
    receiver: Receiver<(usize, Said)>,
    sender: Sender<(usize, Said)>,
}

impl World {
    pub(crate) fn start(commands: impl IntoIterator<Item = Command>, job: String) -> Self {
        let (sender, receiver) = mpsc::channel();
        let mut world = Self { ranks: Vec::new(), job, receiver, sender };
        for command in commands {
            world.add(command);
        }
        world
    }

    /// Starts one more process, and returns its place in `ranks`.
    pub(crate) fn add(&mut self, mut command: Command) -> usize {
        let at = self.ranks.len();
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        forward(child.stdout.take().unwrap(), at, self.sender.clone(), Said::Output);
        forward(child.stderr.take().unwrap(), at, self.sender.clone(), Said::Error);
        let (pid, output, errors) = (child.id(), Vec::new(), Vec::new());
        self.ranks.push(Rank { child, pid, output, errors, open_streams: 2, status: None });
        at
    }

    /// Waits until `is_so`; panics with all that was said if that takes too long.
    pub(crate) fn wait_until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        self.wait_up_to(PATIENCE, what, is_so);
    }

    fn wait_up_to(&mut self, patience: Duration, what: &str, is_so: impl Fn(&Self) -> bool) {
        let end = Instant::now() + patience;
        while !is_so(self) {
            if let Ok((at, said)) = self.receiver.recv_timeout(Duration::from_millis(10)) {
                match said {
                    Said::Output(line) => self.ranks[at].output.push(line),
                    Said::Error(line) => self.ranks[at].errors.push(line),
                    Said::End => self.ranks[at].open_streams -= 1,
                }
            }
            for rank in &mut self.ranks {
                if rank.status.is_none() && rank.open_streams == 0 {
                    rank.status = rank.child.try_wait().unwrap();
                }
            }
            assert!(Instant::now() < end, "{what}: not within {patience:?}\n{}", self.transcript());
        }
    }

    pub(crate) fn wait_until_all_said(&mut self, line: &str) {
        self.wait_until(line, |world| world.ranks.iter().all(|rank| rank.said(line) || rank.has_ended()));
        assert!(self.ranks.iter().all(|rank| rank.said(line)), "{line}\n{}", self.transcript());
    }

    /// Waits until every process has ended by itself.
    pub(crate) fn wait_for_end(&mut self) {
        self.wait_within(PATIENCE);
    }

    /// The same, for processes that work for long.
    pub(crate) fn wait_within(&mut self, patience: Duration) {
        let all_ended = |world: &Self| world.ranks.iter().all(Rank::has_ended);
        self.wait_up_to(patience, "the end of all processes", all_ended);
    }

    /// Asks ranks that loop to end in good order.
    pub(crate) fn ask_to_end(&mut self) {
        for rank in &mut self.ranks {
            drop(rank.child.stdin.take());
        }
    }

    /// All ranks end in good order, with the right results.
    pub(crate) fn expect_good_end(&mut self) {
        self.ask_to_end();
        self.wait_for_end();
        let all_well = self.ranks.iter().all(|rank| rank.said("done") && rank.status.unwrap().success());
        assert!(all_well, "{}", self.transcript());
    }

    pub(crate) fn signal(&self, at: usize, signal: Signal) {
        // Not waited for yet, so the number cannot have gone to another process.
        assert!(self.ranks[at].status.is_none(), "rank {at} has ended\n{}", self.transcript());
        kill_process(Pid::from_raw(self.ranks[at].pid as i32).unwrap(), signal).unwrap();
    }

    /// Kills `at` and returns when.
    pub(crate) fn kill(&self, at: usize) -> u64 {
        let at_ns = super::now_ns();
        self.signal(at, Signal::KILL);
        at_ns
    }

    /// What the running processes hold that must be gone afterwards.
    pub(crate) fn traces(&self) -> Traces {
        let pids: Vec<u32> = self.ranks.iter().map(|rank| rank.pid).collect();
        Traces::of(&pids, &self.job)
    }

    pub(crate) fn transcript(&self) -> String {
        let mut text = String::new();
        for (at, rank) in self.ranks.iter().enumerate() {
            text += &format!("-- process {at} (pid {}), {:?}\n", rank.pid, rank.status);
            for line in rank.output.iter().chain(&rank.errors).take(60) {
                text += &format!("   {line}\n");
            }
        }
        text
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            if rank.status.is_none() {
                // An error means that it has ended meanwhile.
                let _ = rank.child.kill();
                let _ = rank.child.wait();
            }
        }
    }
}

fn forward(
    stream: impl Read + Send + 'static,
    at: usize,
    sender: Sender<(usize, Said)>,
    wrap: fn(String) -> Said,
) {
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if sender.send((at, wrap(line))).is_err() {
                return;
            }
        }
        let _ = sender.send((at, Said::End));
    });
}
