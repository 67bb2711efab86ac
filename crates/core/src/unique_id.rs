//! The job secret and the unique id.

/// The 256-bit secret of a job. Neither `Debug` nor `Display` shows it.
#[derive(Clone)]
pub struct Secret([u8; 32]);

impl Secret {
    /// Wraps 32 random bytes.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes, for key derivation and for handing the secret to a child. Never print or log them.
    pub const fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// "A store is listening there, and this is its secret."
#[derive(Clone, Debug)]
pub struct UniqueId {}
