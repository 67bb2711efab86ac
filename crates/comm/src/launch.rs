//! How this process was started: which launcher, which rank, which store.
