//! What the fuzz targets call: decoders that nobody else can reach. Only with the feature `fuzzing`, and no promise.

pub use crate::connect::fuzzing::{connection, connection_seeds};
pub use crate::plane::fuzzing::{plane_messages, plane_seeds};
