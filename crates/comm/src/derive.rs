//! Communicators made of others: `split` and `duplicate`.
//!
//! All ranks of the parent tell each other colour, key and a number that a new communicator could have; so each knows all new
//! groups. Rank 0 of each hands its control memory to the others over the connections that there are, and a last
//! reduction tells whether all have theirs. From then on the child stands on its own. Where the parent works on GPUs, its children
//! then get theirs (`gpu/derive.rs`).

use std::sync::Arc;

use unisono_core::ReduceOp;
use unisono_core::call::CallHeader;
use unisono_node::SharedMemory;
use unisono_sync::Deadline;

use crate::buffer::BufMut;
use crate::call::{Call, Kind};
use crate::communicator::{Communicator, Parts};
use crate::error::{Error, Result};
use crate::neighbours::Neighbours;

/// What each rank tells the others: 0 or 1 + its colour, its key, and a number for a group of which it is rank 0.
const WISH_WORDS: usize = 3;

impl Communicator {
    /// Splits the ranks into groups: those with one `color` get a communicator of their own, in which they are ranked by
    /// `key`, and by their rank here where keys are equal. Who has no color gets `None`. Collective: every rank calls it.
    ///
    /// The new communicators have memory of their own and are independent of this one: each may be destroyed, dropped or fail
    /// without the others. They live on the same connections, so a process that dies is noticed in each that it is in.
    ///
    /// Where this one works on GPUs, so do they, each rank on its device, with the same settings and the same kernels prepared.
    /// How the GPUs of a group reach each other is found anew. Kernels are those of the group's size: where they are not in the
    /// cache yet, compiling them takes seconds. Calls that other communicators of this process have in streams may not wait for
    /// calls that a rank makes only afterwards. Ranks of one process split on threads of their own, or one thread asks a group
    /// for all of them ([`Grouped::split`](crate::Grouped::split)).
    ///
    /// ```
    /// # use unisono::{Communicator, Operations, ReduceOp};
    /// # let ranks = Communicator::threads(4)?;
    /// # let ranks: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || {
    /// let parity = (rank.rank() % 2) as u32;
    /// let half = rank.split(Some(parity), 0)?.unwrap();
    /// let mut sum = [rank.rank() as u32];
    /// half.all_reduce(&mut sum, ReduceOp::Sum)?;
    /// assert_eq!(sum[0], if parity == 0 { 0 + 2 } else { 1 + 3 });
    /// # half.destroy()?; rank.destroy() })).collect();
    /// # for rank in ranks { rank.join().unwrap()?; }
    /// # Ok::<(), unisono::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Mismatch`] if another rank makes another call; [`Error::Node`] on every rank if any of them cannot have the
    /// memory (then this communicator still works); the first cause of a failure of this one. With GPUs, after which it still
    /// works, too: `Error::Cuda`, [`Error::Device`] or `Error::NoPeerAccess` on every rank with a color if any of them cannot
    /// have what it needs on its device; only those say why that cannot.
    pub fn split(&self, color: Option<u32>, key: i32) -> Result<Option<Self>> {
        self.derive(Kind::Split, color, key)
    }

    /// Another communicator of the same ranks, with memory and an order of calls of its own. Collective: every rank calls it.
    ///
    /// # Errors
    /// Those of [`Communicator::split`].
    pub fn duplicate(&self) -> Result<Self> {
        let duplicate = self.derive(Kind::Duplicate, Some(0), 0)?;
        Ok(duplicate.expect("who has a color is in a group"))
    }

    fn derive(&self, kind: Kind, color: Option<u32>, key: i32) -> Result<Option<Self>> {
        let (rank, world_size) = (self.rank(), self.world_size());
        let mut engine = self.engine();
        engine.meet(CallHeader::bare(kind), self.patience)?;
        let wish = [color.map_or(0, |color| u64::from(color) + 1), key as u64, self.neighbours.new_group()];
        let mut wishes = vec![0; world_size * WISH_WORDS];
        wishes[rank * WISH_WORDS..][..WISH_WORDS].copy_from_slice(&wish);
        engine.submit(&Call::new(Kind::AllGather, [BufMut::from(&mut wishes).raw()]))?;
        let members = members(&wishes, wish[0]);
        let child = members.first().map(|first| {
            let group = wishes[first * WISH_WORDS + 2];
            let neighbours = self.neighbours.subset(&members, group);
            let memory = self.memory_of(&neighbours);
            (neighbours, memory)
        });
        let is_well = child.as_ref().is_none_or(|(_, memory)| memory.is_ok());
        let mut all_are = [u8::from(is_well)];
        engine
            .submit(&Call::new(Kind::AllReduce { op: ReduceOp::Min }, [BufMut::from(&mut all_are).raw()]))?;
        let policy = engine.policy();
        drop(engine);
        let child =
            child.map(|(neighbours, memory)| memory.map(|memory| (neighbours, memory))).transpose()?;
        if all_are[0] == 0 {
            let Some((_, memory)) = child else { return Ok(None) };
            let (bytes, message) = (memory.bytes(), "another rank of this host could not map it".to_owned());
            return Err(Error::Node(unisono_node::Error::Memory { bytes, action: kind.name(), message }));
        }
        let assemble = |(neighbours, memory)| {
            let places = members.iter().map(|member| self.places[*member].clone()).collect();
            let topology = Arc::new(self.topology.of(&members));
            let about = self.control.about().clone();
            let selection = Arc::new(self.selection.of_world(members.len()));
            let parts = Parts { places, topology, neighbours, memory, selection, about };
            let child = Self::assemble(parts, policy);
            child.engine().have_met();
            child
        };
        #[cfg_attr(not(feature = "cuda"), expect(unused_mut, reason = "only a device is attached"))]
        let mut child = child.map(assemble);
        #[cfg(feature = "cuda")]
        self.attach_child(child.as_mut(), &members)?;
        Ok(child)
    }

    fn memory_of(&self, neighbours: &Neighbours) -> Result<Arc<SharedMemory>> {
        let deadline = self.patience.map_or(Deadline::NEVER, Deadline::after);
        let memory = Self::share_control(neighbours, deadline, &|| self.control.abort().raised().is_some());
        // What may still come is for nobody.
        memory.inspect_err(|_| neighbours.close())
    }
}

/// The ranks that wish for this color, in the order of the new communicator; none for color 0.
fn members(wishes: &[u64], color: u64) -> Vec<usize> {
    let wishes: Vec<&[u64]> = wishes.chunks(WISH_WORDS).collect();
    let mut members: Vec<usize> =
        (0..wishes.len()).filter(|rank| color != 0 && wishes[*rank][0] == color).collect();
    members.sort_by_key(|rank| wishes[*rank][1] as i64);
    members
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_one_color_are_ordered_by_key_and_then_by_rank() {
        let wish = |color: u64, key: i32| [color, key as u64, 0];
        let wishes =
            [wish(1, 5), wish(2, 0), wish(1, -5), wish(0, 0), wish(1, 5), wish(1, i32::MIN)].concat();
        assert_eq!(members(&wishes, 1), [5, 2, 0, 4]);
        assert_eq!(members(&wishes, 2), [1]);
        assert!(members(&wishes, 0).is_empty());
    }
}
