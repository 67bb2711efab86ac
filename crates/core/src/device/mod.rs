//! The GPU's side of the pure logic: where everything lies in the memory that GPUs share, and which form a call takes.

pub mod engine;
pub mod layout;
pub mod multiprocessors;
pub mod select;
pub mod table;

pub use layout::{ArenaLayout, Link};
pub use select::{Form, Launch, Wish};
pub use table::Table;
