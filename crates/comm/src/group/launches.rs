//! What a group enqueues on GPUs: for each communicator its collectives, one after the other, and then all of its messages at once.

use unisono_core::device::layout::MAX_MESSAGES;
use unisono_cuda::Stream;

use crate::call::Call;
use crate::collectives::OnDevice;
use crate::communicator::Communicator;
use crate::error::{Error, Result};
use crate::gpu::{Prepared, PreparedEach};
use crate::stream;

/// Checked calls, by communicator.
#[derive(Debug, Default)]
pub(super) struct Launches<'b>(Vec<OfOne<'b>>);

#[derive(Debug)]
struct OfOne<'b> {
    communicator: &'b Communicator,
    collectives: Vec<Collective<'b>>,
    messages: Vec<OnDevice>,
    /// Of the messages.
    stream: Option<&'b Stream>,
}

#[derive(Debug)]
enum Collective<'b> {
    One(Prepared, &'b Stream),
    OnEach(Box<PreparedEach>, &'b [stream::Stream]),
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
        let of = self.of(communicator);
        match prepared {
            Prepared::Collective(_) => of.collectives.push(Collective::One(prepared, stream)),
            Prepared::Messages(messages) => {
                of.check(call, messages.len(), stream)?;
                if !messages.is_empty() {
                    of.stream = Some(stream);
                }
                of.messages.extend(messages);
            }
        }
        Ok(())
    }

    /// Checks a call on a buffer of each device and notes it.
    pub(super) fn add_each(
        &mut self,
        communicator: &'b Communicator,
        call: &Call<'b>,
        streams: &'b [stream::Stream],
    ) -> Result<()> {
        let prepared = communicator.prepare_each(call, streams)?;
        self.of(communicator).collectives.push(Collective::OnEach(Box::new(prepared), streams));
        Ok(())
    }

    fn of(&mut self, communicator: &'b Communicator) -> &mut OfOne<'b> {
        let known = self.0.iter().position(|of| std::ptr::eq(of.communicator, communicator));
        let at = known.unwrap_or(self.0.len());
        if known.is_none() {
            let (collectives, messages) = (Vec::new(), Vec::new());
            self.0.push(OfOne { communicator, collectives, messages, stream: None });
        }
        &mut self.0[at]
    }

    /// Puts everything into its streams; the first failure. Nobody waits for anything here.
    pub(super) fn enqueue(self) -> Result<()> {
        let mut result = Ok(());
        for of in self.0 {
            for collective in &of.collectives {
                let enqueued = match collective {
                    Collective::One(prepared, stream) => of.communicator.enqueue_on(prepared, stream),
                    Collective::OnEach(prepared, streams) => of.communicator.enqueue_each(prepared, streams),
                };
                result = result.and(enqueued);
            }
            if let Some(stream) = of.stream {
                let messages = Prepared::Messages(of.messages);
                result = result.and(of.communicator.enqueue_on(&messages, stream));
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
        if self.stream.is_some_and(|of_messages| of_messages.raw() != stream.raw()) {
            let expected = "one for all messages of a communicator in a group".to_owned();
            return argument("stream", expected, "another one".to_owned());
        }
        Ok(())
    }
}
