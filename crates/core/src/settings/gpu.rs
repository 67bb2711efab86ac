//! What settings say of the memory of GPUs. Ranks may differ in it: whoever receives memory sees what it is.

/// What a rank's copy of a pinned window is made of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum PinnedWay {
    /// Memory of the GPU's NUMA node where the device offers it, else a registered memfd.
    #[default]
    Auto,
    /// A sealed memfd that each process registers with the driver.
    Memfd,
    /// Memory that the driver takes on the GPU's NUMA node.
    Numa,
}

impl PinnedWay {
    pub(super) fn from_word(word: &str) -> Option<Self> {
        match word {
            "auto" => Some(Self::Auto),
            "memfd" => Some(Self::Memfd),
            "numa" => Some(Self::Numa),
            _ => None,
        }
    }
}

/// As what memory of GPUs is handed to other processes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum HandleKind {
    /// Whatever reaches the other ranks: on one host a descriptor.
    #[default]
    Auto,
    /// A file descriptor.
    Descriptor,
    /// A fabric handle: 64 bytes, valid on all hosts of a fabric.
    Fabric,
}

impl HandleKind {
    pub(super) fn from_word(word: &str) -> Option<Self> {
        match word {
            "auto" => Some(Self::Auto),
            "descriptor" => Some(Self::Descriptor),
            "fabric" => Some(Self::Fabric),
            _ => None,
        }
    }
}
