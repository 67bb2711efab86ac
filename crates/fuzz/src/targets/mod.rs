//! The list of targets: what stands at each border of a process, from the lowest crate to the highest.

mod core;
mod recorder;

use unisono::fuzzing as comm;
use unisono_cuda::fuzzing as cuda;
use unisono_node::fuzzing as node;

use super::Input::{Parts, Whole};
use super::{Input, Target};

const fn target(name: &'static str, input: Input) -> Target {
    Target { name, input }
}

/// All of them.
pub const TARGETS: &[Target] = &[
    target("unique_id", Whole(core::unique_id, core::unique_id_seeds)),
    target("hello", Whole(core::hello, core::hello_seeds)),
    target("world_table", Whole(core::world_table, core::world_table_seeds)),
    target("frame_header", Whole(core::frame_header, core::frame_header_seeds)),
    target("sealed_frames", Whole(core::sealed_frames, core::sealed_frames_seeds)),
    target("handshake", Whole(core::handshake, core::handshake_seeds)),
    target("call_header", Whole(core::call_header, core::call_header_seeds)),
    target("settings", Whole(core::settings, core::settings_seeds)),
    target("tuning", Whole(core::tuning, core::tuning_seeds)),
    target("snapshot", Parts(recorder::snapshot, recorder::snapshot_seeds)),
    target("cubin", Whole(cuda::cubin, cuda::cubin_seeds)),
    target("node_connection", Parts(node::connection, node::connection_seeds)),
    target("node_plane", Parts(node::plane_messages, node::plane_seeds)),
    target("cause", Whole(comm::cause, comm::cause_seeds)),
    target("offer", Whole(comm::offer, comm::offer_seeds)),
    target("meeting", Parts(comm::meeting, comm::meeting_seeds)),
    target("launch", Whole(comm::launch, comm::launch_seeds)),
    target("secret_file", Whole(comm::secret_file, comm::secret_seeds)),
    target("tcp_requests", Parts(comm::tcp_requests, comm::tcp_request_seeds)),
    target("tcp_replies", Whole(comm::tcp_replies, comm::tcp_reply_seeds)),
    target("torch_requests", Whole(comm::torch_requests, comm::torch_request_seeds)),
    target("torch_replies", Whole(comm::torch_replies, comm::torch_reply_seeds)),
    target("file_log", Whole(comm::file_log, comm::file_seeds)),
];
