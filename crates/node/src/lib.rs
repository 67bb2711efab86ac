//! One host: shared memory, the node plane, windows.
