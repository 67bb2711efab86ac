//! The unisono command.
