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

/// How the kernels of a communicator are launched, on devices that offer it (sm_90 and later). Ranks may differ.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum GpuLaunch {
    /// Blocks of the next kernel are brought onto the device while the one before still runs, and wait there for its end, where they are
    /// so few that the budget of blocks has room for them beside it.
    #[default]
    Auto,
    /// One after the other.
    Plain,
    /// As `Auto`, whatever room they take: for measuring.
    Dependent,
    /// One after the other, in the memory synchronisation domain for remote memory, so that fences do not wait for what kernels of others
    /// have under way: for measuring.
    Remote,
    /// As `Dependent` and `Remote`.
    Both,
}

impl GpuLaunch {
    /// The most threads of a kernel that is brought onto the device early, if `room` is what the budget has for it.
    pub const fn early_threads(self, room: u32) -> u32 {
        match self {
            Self::Auto => room,
            Self::Plain | Self::Remote => 0,
            Self::Dependent | Self::Both => u32::MAX,
        }
    }

    /// Whether kernels run in the domain for remote memory.
    pub const fn is_remote(self) -> bool {
        matches!(self, Self::Remote | Self::Both)
    }

    pub(super) fn from_word(word: &str) -> Option<Self> {
        match word {
            "auto" => Some(Self::Auto),
            "plain" => Some(Self::Plain),
            "dependent" => Some(Self::Dependent),
            "remote" => Some(Self::Remote),
            "both" => Some(Self::Both),
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
