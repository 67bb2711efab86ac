//! Variables and files that a launcher, or whoever stands in its place, has written.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;

use rustix::fs::{MemfdFlags, Mode, fchmod, memfd_create};

use super::secret::from_private_file;
use super::{Launch, StoreAddress};

/// Lines of `NAME=value`.
///
/// # Panics
/// If an address is not the same once written and read again.
pub fn launch(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let lookup = |name: &str| {
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        pairs.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
    };
    match Launch::detect_below(&lookup, &|| "parent-7-1234".to_owned()) {
        Ok(launch) => {
            assert!(launch.member.rank() < launch.member.world_size());
            drop((launch.store.to_string(), launch.serves_store()));
        }
        Err(error) => drop(error.to_string()),
    }
    if let Some(Ok(address)) = lookup("UNISONO_STORE").map(|text| StoreAddress::parse(&text)) {
        assert_eq!(StoreAddress::parse(&address.to_string()).unwrap(), address);
    }
}

/// The content of a private file that should hold the secret.
///
/// # Panics
/// If another secret is read than the file holds.
pub fn secret_file(content: &[u8]) {
    let mut file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
    fchmod(&file, Mode::RUSR | Mode::WUSR).unwrap();
    file.write_all(content).unwrap();
    let Ok(secret) = from_private_file(file.as_fd()) else { return };
    let hex: String = secret.expose().iter().map(|byte| format!("{byte:02x}")).collect();
    let is_it = content == secret.expose() || content.trim_ascii_end().eq_ignore_ascii_case(hex.as_bytes());
    assert!(is_it, "{content:?}");
}

/// What each launcher sets.
pub fn launch_seeds() -> Vec<Vec<u8>> {
    let texts = [
        "RANK=2\nLOCAL_RANK=2\nWORLD_SIZE=4\nLOCAL_WORLD_SIZE=4\nMASTER_ADDR=127.0.0.1\nMASTER_PORT=40001\n\
         UNISONO_STORE=tcp://127.0.0.1:40000\nUNISONO_JOB=run-5f\nUNISONO_SECRET_FD=3",
        "RANK=9\nWORLD_SIZE=16\nLOCAL_RANK=1\nLOCAL_WORLD_SIZE=8\nGROUP_RANK=1\nMASTER_ADDR=gpu01\n\
         MASTER_PORT=29500\nTORCHELASTIC_RUN_ID=a7\nTORCHELASTIC_RESTART_COUNT=3\n\
         TORCHELASTIC_USE_AGENT_STORE=True\nUNISONO_STORE=torch://[::1]:7",
        "OMPI_COMM_WORLD_RANK=1\nOMPI_COMM_WORLD_SIZE=4\nOMPI_COMM_WORLD_LOCAL_RANK=1\n\
         OMPI_COMM_WORLD_LOCAL_SIZE=4\nPMIX_NAMESPACE=prterun-box-4711@1\nUNISONO_STORE=file:///tmp/x",
        "PMI_RANK=0\nPMI_SIZE=2\nMPI_LOCALRANKID=0\nMPI_LOCALNRANKS=2",
        "SLURM_PROCID=3\nSLURM_NTASKS=8\nSLURM_LOCALID=3\nSLURM_JOB_ID=11\nSLURM_STEP_ID=0\n\
         SLURM_STEP_NUM_NODES=1\nSLURM_STEP_NUM_TASKS=8",
    ];
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

/// A secret in raw bytes, in digits, and with a line end.
pub fn secret_seeds() -> Vec<Vec<u8>> {
    vec![
        vec![7; 32],
        b"0123456789abcdefABCDEF0123456789abcdefABCDEF01234567890123456789"[..64].to_vec(),
        [&[b'a'; 64][..], b"\n"].concat(),
    ]
}
