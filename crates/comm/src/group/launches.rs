//! What a group enqueues on GPUs: for each communicator its collectives, one after the other, and then all of its messages at once.

use unisono_core::device::layout::MAX_MESSAGES;
use unisono_cuda::Stream;

use crate::call::Call;
use crate::collectives::OnDevice;
use crate::communicator::Communicator;
use crate::error::{Error, Result};
use crate::gpu::Prepared;

/// Checked calls, by communicator.
#[derive(Debug, Default)]
pub(super) struct Launches<'b>(Vec<OfOne<'b>>);

#[derive(Debug)]
struct OfOne<'b> {
    communicator: &'b Communicator,
    collectives: Vec<(Prepared, &'b Stream)>,
    messages: Vec<OnDevice>,
    /// Of the messages.
    stream: &'b Stream,
}

impl<'b> Launches<'b> {
    /// Checks a call and notes it.
    pub(super) fn add(
        &mut self,
        communicator: &'b Communicator,
        call: &Call<'b>,
        stream: &'b Stream,
    ) -> Result<()> {
        let prepared = communicator.prepare_on(call, stream)?;
        let known = self.0.iter().position(|of| std::ptr::eq(of.communicator, communicator));
        let at = known.unwrap_or(self.0.len());
        if known.is_none() {
            self.0.push(OfOne { communicator, collectives: Vec::new(), messages: Vec::new(), stream });
        }
        let of = &mut self.0[at];
        match prepared {
            Prepared::Collective(_) => of.collectives.push((prepared, stream)),
            Prepared::Messages(messages) => {
                of.check(call, messages.len(), stream)?;
                of.messages.extend(messages);
                of.stream = stream;
            }
        }
        Ok(())
    }

    /// Puts everything into its streams; the first failure. Nobody waits for anything here.
    pub(super) fn enqueue(self) -> Result<()> {
        let mut result = Ok(());
        for of in self.0 {
            for (collective, stream) in &of.collectives {
                result = result.and(of.communicator.enqueue_on(collective, stream));
            }
            if !of.messages.is_empty() {
                let messages = Prepared::Messages(of.messages);
                result = result.and(of.communicator.enqueue_on(&messages, of.stream));
            }
        }
        result
    }
}

impl OfOne<'_> {
    /// Whether so many messages more go into the same launch.
    fn check(&self, call: &Call<'_>, more: usize, stream: &Stream) -> Result<()> {
        let argument = |what, expected, got| {
            Err(Error::Argument {
                call: call.kind.name(),
                rank: self.communicator.rank(),
                what,
                expected,
                got,
            })
        };
        let number = self.messages.len() + more;
        if number > MAX_MESSAGES {
            let expected = format!("at most {MAX_MESSAGES} on its GPU");
            return argument("number of messages in the group", expected, number.to_string());
        }
        if !self.messages.is_empty() && self.stream.raw() != stream.raw() {
            let expected = "one for all messages of a communicator in a group".to_owned();
            return argument("stream", expected, "another one".to_owned());
        }
        Ok(())
    }
}
