//! The one writer of a job's output: a thread that reads every pipe of every rank and writes whole lines.
//!
//! Because nobody else writes, lines are never torn; because it is a thread of its own, a reader that stops reading us
//! holds up the ranks' output but never the loop that watches the ranks. Costs one thread, and one write per read.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use anstyle::{AnsiColor, Style};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;

use super::lines::Lines;

const CHUNK_BYTES: usize = 64 * 1024;
/// What is read at most of a pipe once all ranks ended: more than a pipe holds, so that nothing of theirs is lost, and
/// bounded, because a process that a rank left behind may write forever.
const MAX_DRAIN_BYTES: usize = 2 << 20;

/// Standard output or standard error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stream {
    Out,
    Err,
}

/// The reading end of a pipe from a rank.
#[derive(Debug)]
pub(crate) struct Source {
    pub(super) rank: usize,
    pub(super) stream: Stream,
    pub(crate) pipe: OwnedFd,
}

enum Message {
    /// A line of ours for standard error.
    Say(String),
    /// All ranks ended: write what is left, then these lines to standard error and this to standard output, and end.
    Finish { lines: Vec<String>, result: Vec<u8> },
}

/// The handle of the writer thread.
pub(super) struct Writer {
    sender: Sender<Message>,
    wake: OwnedFd,
    /// Reaches its end when the thread has ended.
    done: OwnedFd,
    thread: JoinHandle<()>,
}

impl Writer {
    /// Starts the thread. Call it with the signals blocked that others are to receive.
    pub(super) fn start(sources: Vec<Source>, world_size: usize) -> io::Result<Self> {
        let (sender, messages) = mpsc::channel();
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (done, ended) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let mut pipes = Vec::with_capacity(sources.len());
        for source in sources {
            rustix::io::ioctl_fionbio(&source.pipe, true)?;
            let prefix = prefix(source.rank, world_size, has_colour(source.stream));
            pipes.push(Pipe {
                file: File::from(source.pipe),
                stream: source.stream,
                lines: Lines::new(prefix),
            });
        }
        let worker =
            Worker { messages, wake: wake.try_clone()?, pipes, out: Sink::default(), err: Sink::default() };
        let thread = std::thread::Builder::new().name("output".to_owned()).spawn(move || {
            worker.run();
            drop(ended);
        })?;
        Ok(Self { sender, wake, done, thread })
    }

    /// Writes a line of ours to standard error, between the lines of the ranks.
    pub(super) fn say(&self, text: &str) {
        self.send(Message::Say(own_line(text)));
    }

    /// Ends the thread once it has written what the ranks left in their pipes, then `lines` to standard error and
    /// `result` to standard output. [`Writer::done`] tells when.
    pub(super) fn finish(&self, lines: &[String], result: Vec<u8>) {
        let lines = lines.iter().map(|line| own_line(line)).collect();
        self.send(Message::Finish { lines, result });
    }

    /// Readable (at its end) when the thread has ended.
    pub(super) fn done(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }

    /// Waits for the thread.
    pub(super) fn join(self) {
        if self.thread.join().is_err() {
            tracing::error!("the thread that writes the output panicked; output may be missing");
        }
    }

    fn send(&self, message: Message) {
        // Fails only when the thread has ended, which it does not before `finish`.
        if self.sender.send(message).is_ok() {
            let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        }
    }
}

fn has_colour(stream: Stream) -> bool {
    let choice = match stream {
        Stream::Out => anstream::AutoStream::choice(&io::stdout()),
        Stream::Err => anstream::AutoStream::choice(&io::stderr()),
    };
    choice != anstream::ColorChoice::Never
}

fn own_line(text: &str) -> String {
    let style = if has_colour(Stream::Err) { Style::new().bold() } else { Style::new() };
    format!("{}unisono:{} {text}\n", style.render(), style.render_reset())
}

/// `[ 3] `, as wide as the largest rank needs.
fn prefix(rank: usize, world_size: usize, colour: bool) -> Vec<u8> {
    const COLOURS: [AnsiColor; 6] = [
        AnsiColor::Cyan,
        AnsiColor::Yellow,
        AnsiColor::Green,
        AnsiColor::Magenta,
        AnsiColor::Blue,
        AnsiColor::BrightRed,
    ];
    let width = (world_size.saturating_sub(1)).to_string().len();
    let style = if colour { COLOURS[rank % COLOURS.len()].on_default() } else { Style::new() };
    format!("{}[{rank:>width$}]{} ", style.render(), style.render_reset()).into_bytes()
}

struct Pipe {
    file: File,
    stream: Stream,
    lines: Lines,
}

enum Progress {
    Open,
    Ended,
}

impl Pipe {
    /// Reads once and puts complete lines into `out`.
    fn read(&mut self, chunk: &mut [u8], out: &mut Vec<u8>) -> (usize, Progress) {
        match self.file.read(chunk) {
            Ok(0) => {
                self.lines.finish(out);
                (0, Progress::Ended)
            }
            Ok(count) => {
                self.lines.push(&chunk[..count], out);
                (count, Progress::Open)
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                (0, Progress::Open)
            }
            Err(error) => {
                tracing::warn!("output of a rank cannot be read: {error}");
                self.lines.finish(out);
                (0, Progress::Ended)
            }
        }
    }
}

/// One of our own streams; closed for good once nobody reads it any more.
#[derive(Default)]
struct Sink {
    closed: bool,
}

struct Worker {
    messages: Receiver<Message>,
    wake: OwnedFd,
    pipes: Vec<Pipe>,
    out: Sink,
    err: Sink,
}

impl Worker {
    fn run(mut self) {
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            for index in self.ready().into_iter().rev() {
                self.pass_on(index, &mut chunk);
            }
            let mut drained = [0; 8];
            let _ = rustix::io::read(&self.wake, &mut drained);
            while let Ok(message) = self.messages.try_recv() {
                match message {
                    Message::Say(line) => self.write(Stream::Err, line.as_bytes()),
                    Message::Finish { lines, result } => {
                        self.drain(&mut chunk);
                        self.write(Stream::Err, lines.concat().as_bytes());
                        self.write(Stream::Out, &result);
                        return;
                    }
                }
            }
        }
    }

    /// Waits for output or a message; the pipes that have something to read.
    fn ready(&self) -> Vec<usize> {
        let files = self.pipes.iter().map(|pipe| pipe.file.as_fd());
        let mut polled: Vec<PollFd<'_>> = files
            .chain([self.wake.as_fd()])
            .map(|file| PollFd::from_borrowed_fd(file, PollFlags::IN))
            .collect();
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(Errno::INTR) => return Vec::new(),
            // Out of memory in the kernel: read every pipe instead, none of which blocks.
            Err(_) => return (0..self.pipes.len()).collect(),
        }
        (0..self.pipes.len()).filter(|index| !polled[*index].revents().is_empty()).collect()
    }

    fn pass_on(&mut self, index: usize, chunk: &mut [u8]) {
        let pipe = &mut self.pipes[index];
        let stream = pipe.stream;
        let mut out = Vec::new();
        let (_, progress) = pipe.read(chunk, &mut out);
        if matches!(progress, Progress::Ended) {
            self.pipes.swap_remove(index);
        }
        self.write(stream, &out);
    }

    /// Writes what lies in the pipes, without waiting for processes that the ranks left behind.
    fn drain(&mut self, chunk: &mut [u8]) {
        for mut pipe in std::mem::take(&mut self.pipes) {
            let mut total = 0;
            while total < MAX_DRAIN_BYTES {
                let mut out = Vec::new();
                let (count, _) = pipe.read(chunk, &mut out);
                self.write(pipe.stream, &out);
                if count == 0 {
                    break;
                }
                total += count;
            }
            let mut out = Vec::new();
            pipe.lines.finish(&mut out);
            self.write(pipe.stream, &out);
        }
    }

    fn write(&mut self, stream: Stream, bytes: &[u8]) {
        let (sink, file) = match stream {
            Stream::Out => (&mut self.out, rustix::stdio::stdout()),
            Stream::Err => (&mut self.err, rustix::stdio::stderr()),
        };
        if sink.closed || bytes.is_empty() {
            return;
        }
        if let Err(errno) = write_all(file, bytes) {
            // Nobody reads us: the ranks learn it the usual way, when they write into a pipe without a reader.
            sink.closed = true;
            self.pipes.retain(|pipe| pipe.stream != stream);
            if errno != Errno::PIPE {
                tracing::error!("output cannot be written: {errno}");
            }
        }
    }
}

/// Writes everything, even where the stream is shared with somebody who made it non-blocking.
fn write_all(file: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(file, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let mut polled = [PollFd::from_borrowed_fd(file, PollFlags::OUT)];
                match poll(&mut polled, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno),
                }
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_aligned_to_the_widest_rank() {
        let text = |rank, world_size| String::from_utf8(prefix(rank, world_size, false)).unwrap();
        assert_eq!((text(0, 1), text(3, 10), text(3, 11)), ("[0] ".into(), "[3] ".into(), "[ 3] ".into()));
        assert_eq!(text(127, 128), "[127] ");
    }

    #[test]
    fn colours_end_before_the_output_of_the_rank_begins() {
        assert_eq!(prefix(1, 2, true), b"\x1b[33m[1]\x1b[0m ");
    }
}
