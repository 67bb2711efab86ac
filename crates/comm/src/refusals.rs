//! What the types must refuse at compile time, each as a documentation test that must fail with the error named. The same
//! program without the offending line compiles: that is the first test.
//!
//! ```
//! use unisono::{Communicator, Memory, Operations, ReduceOp};
//! let rank = Communicator::threads(1)?.remove(0);
//! let (x, mut y) = (vec![1.0f32; 4], vec![0.0f32; 4]);
//! rank.all_reduce_into(&x, &mut y, ReduceOp::Sum)?;
//! let mut window = rank.window::<f32>(4, Memory::Host)?;
//! window.lend()?[0] = 2.0;
//! rank.all_reduce(&mut window, ReduceOp::Sum)?;
//! # Ok::<(), unisono::Error>(())
//! ```
//!
//! A communicator has one operating thread; others use an `Observer`.
//! ```compile_fail,E0277
//! use unisono::{Communicator, Operations};
//! let rank = Communicator::threads(1)?.remove(0);
//! std::thread::scope(|scope| {
//!     scope.spawn(|| rank.barrier());
//! });
//! # Ok::<(), unisono::Error>(())
//! ```
//!
//! There is one of it.
//! ```compile_fail,E0599
//! use unisono::Communicator;
//! let rank = Communicator::threads(1)?.remove(0);
//! let other = rank.clone();
//! # Ok::<(), unisono::Error>(())
//! ```
//!
//! One vector is not input and output at once.
//! ```compile_fail,E0502
//! use unisono::{Communicator, Operations, ReduceOp};
//! let rank = Communicator::threads(1)?.remove(0);
//! let mut x = vec![1.0f32; 4];
//! rank.all_reduce_into(&x, &mut x, ReduceOp::Sum)?;
//! # Ok::<(), unisono::Error>(())
//! ```
//!
//! Source and target have one type.
//! ```compile_fail,E0277
//! use unisono::{Communicator, Operations, ReduceOp};
//! let rank = Communicator::threads(1)?.remove(0);
//! let (x, mut y) = (vec![1.0f32; 4], vec![0.0f64; 4]);
//! rank.all_reduce_into::<f32>(&x, &mut y, ReduceOp::Sum)?;
//! # Ok::<(), unisono::Error>(())
//! ```
//!
//! What is lent of a window is given back before a collective works on it.
//! ```compile_fail,E0499
//! use unisono::{Communicator, Memory, Operations, ReduceOp};
//! let rank = Communicator::threads(1)?.remove(0);
//! let mut window = rank.window::<f32>(4, Memory::Host)?;
//! let lent = window.lend()?;
//! rank.all_reduce(&mut window, ReduceOp::Sum)?;
//! lent[0] = 2.0;
//! # Ok::<(), unisono::Error>(())
//! ```
//!
//! Types with padding, pointers or invalid bit patterns do not travel: only elements do.
//! ```compile_fail,E0277
//! use unisono::{Communicator, Operations};
//! let rank = Communicator::threads(1)?.remove(0);
//! rank.broadcast(&mut [true, false], 0)?;
//! # Ok::<(), unisono::Error>(())
//! ```
//!
//! After the end there is no communicator left to call.
//! ```compile_fail,E0382
//! use unisono::{Communicator, Operations};
//! let rank = Communicator::threads(1)?.remove(0);
//! rank.destroy()?;
//! rank.barrier()?;
//! # Ok::<(), unisono::Error>(())
//! ```
//!
//! The programs about scopes and groups without their offending lines:
//! ```
//! use unisono::{Communicator, Operations, ReduceOp, Stream, group};
//! let (rank, stream) = (Communicator::threads(1)?.remove(0), Stream::host());
//! let (mut x, mut y) = (vec![1.0f32; 4], vec![0.0f32; 4]);
//! rank.scope(|scope| scope.all_reduce(&mut x, ReduceOp::Sum)?.wait())?;
//! x[0] = 2.0;
//! group(|group| group.on(&rank, &stream).all_reduce(&mut y, ReduceOp::Sum))?;
//! group(|group| Ok(group.destroy(rank)))?;
//! # Ok::<(), unisono::Error>(())
//! ```
//!
//! A buffer in flight is neither read nor written.
//! ```compile_fail,E0506
//! use unisono::{Communicator, Operations, ReduceOp};
//! let rank = Communicator::threads(1)?.remove(0);
//! let mut x = [1.0f32; 4];
//! rank.scope(|scope| {
//!     let pending = scope.all_reduce(&mut x, ReduceOp::Sum)?;
//!     x[0] = 2.0;
//!     pending.wait()
//! })?;
//! # Ok::<(), unisono::Error>(())
//! ```
//!
//! Nor lent a second time.
//! ```compile_fail,E0499
//! use unisono::{Communicator, Operations, ReduceOp};
//! let rank = Communicator::threads(1)?.remove(0);
//! let mut x = vec![1.0f32; 4];
//! rank.scope(|scope| {
//!     let first = scope.all_reduce(&mut x, ReduceOp::Sum)?;
//!     let second = scope.all_reduce(&mut x, ReduceOp::Sum)?;
//!     first.wait()
//! })?;
//! # Ok::<(), unisono::Error>(())
//! ```
//!
//! A handle over a local of the scope cannot be forgotten, because the local cannot be lent: it would die first.
//! ```compile_fail,E0597
//! use unisono::{Communicator, Operations, ReduceOp};
//! let rank = Communicator::threads(1)?.remove(0);
//! rank.scope(|scope| {
//!     let mut x = vec![1.0f32; 4];
//!     std::mem::forget(scope.all_reduce(&mut x, ReduceOp::Sum)?);
//!     Ok(())
//! })?;
//! # Ok::<(), unisono::Error>(())
//! ```
//!
//! A handle does not leave its scope.
//! ```compile_fail
//! use unisono::{Communicator, Operations, ReduceOp};
//! let rank = Communicator::threads(1)?.remove(0);
//! let mut x = vec![1.0f32; 4];
//! let pending = rank.scope(|scope| scope.all_reduce(&mut x, ReduceOp::Sum))?;
//! pending.wait()?;
//! # Ok::<(), unisono::Error>(())
//! ```
//!
//! The buffers of a group outlive it.
//! ```compile_fail,E0597
//! use unisono::{Communicator, Operations, ReduceOp, Stream, group};
//! let (rank, stream) = (Communicator::threads(1)?.remove(0), Stream::host());
//! group(|group| {
//!     let mut x = vec![1.0f32; 4];
//!     group.on(&rank, &stream).all_reduce(&mut x, ReduceOp::Sum)
//! })?;
//! # Ok::<(), unisono::Error>(())
//! ```
//!
//! What ends with a group is not used in it.
//! ```compile_fail,E0505
//! use unisono::{Communicator, Operations, Stream, group};
//! let (rank, stream) = (Communicator::threads(1)?.remove(0), Stream::host());
//! group(|group| {
//!     group.on(&rank, &stream).barrier()?;
//!     group.destroy(rank);
//!     Ok(())
//! })?;
//! # Ok::<(), unisono::Error>(())
//! ```
//!
//! The communicator is not dropped while a scope is open.
//! ```compile_fail,E0505
//! use unisono::{Communicator, Operations, ReduceOp};
//! let rank = Communicator::threads(1)?.remove(0);
//! let mut x = vec![1.0f32; 4];
//! rank.scope(|scope| {
//!     let pending = scope.all_reduce(&mut x, ReduceOp::Sum)?;
//!     drop(rank);
//!     pending.wait()
//! })?;
//! # Ok::<(), unisono::Error>(())
//! ```
