//! The links between the GPUs of a host, as NVML, the library of `nvidia-smi`, sees them: NVLinks, PCIe and NUMA nodes.
//!
//! NVML sees all GPUs that the process may open, whatever `CUDA_VISIBLE_DEVICES` says, in an order of its own: identities
//! tell which is which. What comes out are plain values; questions about them need no NVML. A look opens the driver, so it is
//! for once in a process.

use nvml_wrapper::enum_wrappers::device::TopologyLevel;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

use crate::error::{Error, Result};

/// Links that a GPU has at most.
const MAX_LINKS: u32 = 18;
// What NVML calls the other ends of links.
const REMOTE_GPU: u32 = 0;
const REMOTE_SWITCH: u32 = 2;

/// A GPU and its ways to others.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GpuLinks {
    /// Its place in what [`topology`] answered.
    pub index: usize,
    /// Its identity, as [`crate::Uuid`] prints it.
    pub uuid: String,
    /// The name of the product.
    pub name: String,
    /// Where it is plugged in, as `0000:1b:00.0`.
    pub pci: String,
    /// The NUMA node of its PCIe slot, if the system knows.
    pub numa_node: Option<u32>,
    /// Its NVLinks, used or not.
    pub links: Vec<Link>,
    /// The way over PCIe to each GPU of the answer, by its index; none to itself, or where it is not known.
    pub pcie: Vec<Option<Pcie>>,
}

/// One NVLink of a GPU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    /// Whether it carries data.
    pub is_active: bool,
    /// What stands at its other end.
    pub remote: Remote,
    /// Where that is plugged in, if NVML says.
    pub remote_pci: Option<String>,
}

/// What an NVLink leads to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Remote {
    /// Another GPU.
    Gpu,
    /// A switch, behind which all GPUs are that have links to switches.
    Switch,
    /// Something else, or not known.
    Other,
}

/// What two GPUs have in common on PCIe, from near to far, in the words of `nvidia-smi topo`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Pcie {
    /// One PCIe switch, or one board.
    Pix,
    /// Several PCIe switches, and no host bridge.
    Pxb,
    /// The host bridge.
    Phb,
    /// The NUMA node, between several host bridges.
    Node,
    /// The system, between NUMA nodes.
    Sys,
}

impl std::fmt::Display for Pcie {
    /// As `nvidia-smi topo` writes it: `PIX`, `PXB`, `PHB`, `NODE`, `SYS`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Pix => "PIX",
            Self::Pxb => "PXB",
            Self::Phb => "PHB",
            Self::Node => "NODE",
            Self::Sys => "SYS",
        })
    }
}

/// The GPUs of this host and what connects them. One that does not answer is left out, with a warning.
///
/// # Errors
/// [`Error::NoDevice`] if there is no NVML, its driver is of no use, or it shows no GPU.
pub fn topology() -> Result<Vec<GpuLinks>> {
    let none = |reason: String| Error::NoDevice { reason };
    let nvml = Nvml::init().map_err(|error| none(format!("NVML cannot be used: {error}")))?;
    let count = nvml.device_count().map_err(|error| none(format!("NVML counts no devices: {error}")))?;
    let mut devices = Vec::new();
    for index in 0..count {
        match nvml.device_by_index(index).and_then(|device| Ok((describe(&nvml, &device)?, device))) {
            Ok(found) => devices.push(found),
            Err(error) => tracing::warn!("GPU {index} of NVML does not say what it is: {error}"),
        }
    }
    if devices.is_empty() {
        return Err(none(format!("NVML shows {count} devices, of which none answers")));
    }
    let way = |from: usize, to: usize| {
        let level = nvml.topology_common_ancestor(&devices[from].1, &devices[to].1);
        (from != to).then(|| level.ok().map(Pcie::of)).flatten()
    };
    let ways: Vec<Vec<_>> =
        (0..devices.len()).map(|from| (0..devices.len()).map(|to| way(from, to)).collect()).collect();
    let gpus = devices.into_iter().zip(ways).enumerate();
    Ok(gpus.map(|(index, ((gpu, _), pcie))| GpuLinks { index, pcie, ..gpu }).collect())
}

/// How many NVLinks of `a` lead to `b`: the direct ones, and as many as both have to switches. 0 if they are the same.
///
/// A switch can be set up to keep GPUs apart, which the links do not show: then the driver does not let them reach each other
/// ([`crate::Device::reaches`]).
pub fn nvlinks(a: &GpuLinks, b: &GpuLinks) -> u32 {
    if a.uuid == b.uuid {
        return 0;
    }
    let count = |gpu: &GpuLinks, is_meant: &dyn Fn(&Link) -> bool| {
        gpu.links.iter().filter(|link| link.is_active && is_meant(link)).count() as u32
    };
    let direct = count(a, &|link| link.remote == Remote::Gpu && link.remote_pci.as_ref() == Some(&b.pci));
    let switched = |gpu| count(gpu, &|link| link.remote == Remote::Switch);
    direct + switched(a).min(switched(b))
}

/// What `a` and `b`, of one answer, have in common on PCIe; none if they are the same, or it is not known.
pub fn common(a: &GpuLinks, b: &GpuLinks) -> Option<Pcie> {
    a.pcie.get(b.index).copied().flatten()
}

impl Pcie {
    fn of(level: TopologyLevel) -> Self {
        match level {
            TopologyLevel::Internal | TopologyLevel::Single => Self::Pix,
            TopologyLevel::Multiple => Self::Pxb,
            TopologyLevel::HostBridge => Self::Phb,
            TopologyLevel::Node => Self::Node,
            TopologyLevel::System => Self::Sys,
        }
    }
}

/// All but its place and its ways over PCIe.
fn describe(nvml: &Nvml, device: &Device<'_>) -> Result<GpuLinks, NvmlError> {
    let bus_id = device.pci_info()?.bus_id;
    let pci = pci_name(&bus_id).unwrap_or(bus_id);
    let numa_node = std::fs::read_to_string(format!("/sys/bus/pci/devices/{pci}/numa_node"));
    Ok(GpuLinks {
        index: 0,
        uuid: device.uuid()?,
        name: device.name()?,
        numa_node: numa_node.ok().and_then(|text| node(&text)),
        pci,
        links: (0..MAX_LINKS).filter_map(|link| describe_link(nvml, device, link)).collect(),
        pcie: Vec::new(),
    })
}

/// A link, if the GPU has it.
fn describe_link(nvml: &Nvml, device: &Device<'_>, number: u32) -> Option<Link> {
    let link = device.link_wrapper_for(number);
    let is_active = link.is_active().ok()?;
    let remote_pci = link.remote_pci_info().ok().and_then(|remote| pci_name(&remote.bus_id));
    Some(Link { is_active, remote: remote(nvml, device, number), remote_pci })
}

/// What a link leads to. The wrapper has this call, too, but its version 0.13 answers "unknown" for every link.
fn remote(nvml: &Nvml, device: &Device<'_>, link: u32) -> Remote {
    let Ok(ask) = nvml.lib().nvmlDeviceGetNvLinkRemoteDeviceType.as_ref() else { return Remote::Other };
    let mut kind = u32::MAX;
    // SAFETY: NVML is open, the device is one of its own, and the answer is ours.
    let result = unsafe { ask(device.handle(), link, &raw mut kind) };
    match (result, kind) {
        (0, REMOTE_GPU) => Remote::Gpu,
        (0, REMOTE_SWITCH) => Remote::Switch,
        _ => Remote::Other,
    }
}

/// A bus id of NVML, `00000000:1B:00.0`, as the system's files name it: `0000:1b:00.0`.
fn pci_name(bus_id: &str) -> Option<String> {
    let (domain, rest) = bus_id.split_once(':')?;
    let domain = u32::from_str_radix(domain, 16).ok()?;
    Some(format!("{domain:04x}:{}", rest.to_lowercase()))
}

/// A NUMA node as the system's files tell it; -1 is none.
fn node(text: &str) -> Option<u32> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A GPU of a host of four whose links are these, all of the same way over PCIe.
    fn gpu(index: usize, links: Vec<Link>) -> GpuLinks {
        GpuLinks {
            index,
            uuid: format!("GPU-{index}"),
            name: "a GPU".to_owned(),
            pci: format!("0000:{index:02x}:00.0"),
            numa_node: None,
            links,
            pcie: (0..4).map(|other| (other != index).then_some(Pcie::Node)).collect(),
        }
    }

    fn links(count: usize, is_active: bool, remote: Remote, remote_pci: &str) -> Vec<Link> {
        vec![Link { is_active, remote, remote_pci: Some(remote_pci.to_owned()) }; count]
    }

    #[test]
    fn behind_switches_every_link_leads_to_every_gpu() {
        let switched = |index| gpu(index, links(18, true, Remote::Switch, "0000:c1:00.0"));
        assert_eq!(nvlinks(&switched(0), &switched(3)), 18);
        assert_eq!(nvlinks(&switched(0), &switched(0)), 0);
        let fewer = gpu(1, links(12, true, Remote::Switch, "0000:c1:00.0"));
        assert_eq!((nvlinks(&switched(0), &fewer), nvlinks(&fewer, &switched(0))), (12, 12));
        assert_eq!(nvlinks(&switched(0), &gpu(2, Vec::new())), 0);
    }

    #[test]
    fn without_switches_links_lead_where_they_are_plugged_in() {
        let mut first = links(4, true, Remote::Gpu, "0000:01:00.0");
        first.extend(links(2, true, Remote::Gpu, "0000:02:00.0"));
        first.extend(links(1, true, Remote::Other, "0000:03:00.0"));
        let first = gpu(0, first);
        let count = |other| nvlinks(&first, &gpu(other, Vec::new()));
        assert_eq!([count(1), count(2), count(3)], [4, 2, 0]);
    }

    #[test]
    fn links_that_are_not_active_lead_nowhere() {
        let switched = |index| gpu(index, links(18, false, Remote::Switch, "0000:c1:00.0"));
        assert_eq!(nvlinks(&switched(0), &switched(1)), 0);
        let direct = gpu(0, links(4, false, Remote::Gpu, "0000:01:00.0"));
        assert_eq!(nvlinks(&direct, &gpu(1, Vec::new())), 0);
    }

    #[test]
    fn what_two_gpus_have_in_common_is_looked_up_by_their_places() {
        let mut first = gpu(0, Vec::new());
        first.pcie[2] = Some(Pcie::Pix);
        assert_eq!(common(&first, &gpu(2, Vec::new())), Some(Pcie::Pix));
        assert_eq!(common(&first, &gpu(1, Vec::new())), Some(Pcie::Node));
        assert_eq!(common(&first, &first), None);
        assert_eq!(common(&first, &gpu(9, Vec::new())), None);
        assert!(Pcie::Pix < Pcie::Pxb && Pcie::Phb < Pcie::Node && Pcie::Node < Pcie::Sys);
        assert_eq!(format!("{:>5}", Pcie::Node), " NODE");
    }

    #[test]
    fn bus_ids_and_nodes_read_as_the_system_writes_them() {
        assert_eq!(pci_name("00000000:1B:00.0").as_deref(), Some("0000:1b:00.0"));
        assert_eq!(pci_name("00010001:AF:00.0").as_deref(), Some("10001:af:00.0"));
        assert_eq!(pci_name(""), None);
        assert_eq!(pci_name("?:1B:00.0"), None);
        assert_eq!((node("1\n"), node("-1\n"), node("")), (Some(1), None, None));
    }

    #[test]
    fn a_host_without_a_driver_has_no_device_and_others_describe_each_of_theirs() {
        match topology() {
            Err(Error::NoDevice { reason }) => assert!(reason.starts_with("NVML "), "{reason}"),
            Ok(gpus) => {
                assert!(!gpus.is_empty());
                for (index, gpu) in gpus.iter().enumerate() {
                    assert_eq!((gpu.index, gpu.pcie.len()), (index, gpus.len()));
                    assert!(gpu.uuid.starts_with("GPU-") && gpu.links.len() <= 18, "{gpu:?}");
                    assert_eq!(gpus.iter().filter(|other| other.uuid == gpu.uuid).count(), 1);
                    assert_eq!(common(gpu, gpu), None);
                }
            }
            other => panic!("{other:?}"),
        }
    }
}
