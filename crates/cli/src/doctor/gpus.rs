//! GPUs: the driver, each device, how they reach each other, the compiler of kernels and where kernels are kept.
//!
//! A machine without a device is well: its line says so, and nothing else here is asked. What is wrong with GPUs is warned
//! about, because jobs in host memory run all the same.

use std::path::Path;

use unisono::cuda::device::Facts;
use unisono::cuda::{Architecture, Cache, Compiler, Device, Error, GpuLinks, driver, nvml};
use unisono::tuning::device::table::BUILT_IN_FROM;
use unisono::tuning::{self, Tuning};

use super::Finding;
use crate::output::bytes;

const CHECK: &str = "GPUs";
const NVLINK: &str = "NVLink";
const COMPILER: &str = "kernel compiler";

type Version = (u32, u32);

pub(super) fn check() -> Vec<Finding> {
    let version = match driver::version() {
        Ok(version) => version,
        Err(error) => return vec![without_device(&error, Path::new("/dev/nvidiactl").exists())],
    };
    let mut findings = vec![Finding::ok(CHECK, format!("the driver speaks CUDA {}", dotted(version)))];
    let mut devices = Vec::new();
    for ordinal in 0..driver::device_count().unwrap_or(0) {
        match Device::new(ordinal).and_then(|device| Ok((device.memory()?, device))) {
            Ok((memory, opened)) => {
                findings.push(device(ordinal, opened.facts(), memory));
                devices.push(opened);
            }
            Err(error) => findings.push(Finding::warn(
                CHECK,
                format!("cuda:{ordinal} cannot be used: {error}"),
                "nvidia-smi tells its state, and who uses it",
            )),
        }
    }
    let reaches = |from: &Device| devices.iter().map(|to| from.reaches(to).unwrap_or(false)).collect();
    findings.extend(peers(&devices.iter().map(reaches).collect::<Vec<Vec<bool>>>()));
    findings.push(links(nvml::topology().as_deref()));
    let mut architectures: Vec<_> = devices.iter().map(unisono::gpu::kernels::architecture).collect();
    architectures.sort_unstable();
    architectures.dedup();
    let found = Compiler::find().map(|compiler| {
        let missing = architectures.iter().copied().filter(|one| !compiler.supports(*one)).collect();
        (compiler.version(), compiler.path().display().to_string(), missing)
    });
    findings.push(compiler(found, version));
    findings.push(cache(&Cache::of_user()));
    if let Some(device) = devices.first() {
        // What cannot be read is said among the settings.
        let path = std::env::var("UNISONO_TUNE_FILE").ok().filter(|path| !path.trim().is_empty());
        let tuning = path.and_then(|path| Some((tuning::load(&path).ok()?, path)));
        let tuning = tuning.as_ref().map(|(tuning, path)| (tuning, path.as_str()));
        findings.push(forms(&device.facts().name, devices.len(), tuning));
    }
    findings
}

/// Where `count` devices of this name take forms and grids from.
fn forms(name: &str, count: usize, tuning: Option<(&Tuning, &str)>) -> Finding {
    const CHECK: &str = "GPU forms";
    let mend = "unisono tune --device cuda FILE, and UNISONO_TUNE_FILE=FILE";
    let Some((tuning, path)) = tuning else {
        return Finding::ok(CHECK, format!("default, measured on {BUILT_IN_FROM}"));
    };
    match (tuning.on_gpus(), tuning.check_devices(name)) {
        (_, Err(error)) => {
            Finding::fail(CHECK, format!("the tuning file {path} cannot be used: {error}"), mend)
        }
        (None, _) => {
            Finding::ok(CHECK, format!("default, measured on {BUILT_IN_FROM}; {path} has none for GPUs"))
        }
        (Some((devices, worlds)), Ok(())) => {
            let names: Vec<String> = worlds.iter().map(usize::to_string).collect();
            let found = format!("tuning file {path}, measured on {} × {devices}", names.join(", "));
            match worlds.contains(&count) || count < 2 {
                true => Finding::ok(CHECK, found),
                false => Finding::warn(
                    CHECK,
                    format!("{found}, and not on all {count}: these have defaults"),
                    mend,
                ),
            }
        }
    }
}

/// `is_there` says whether the system has an NVIDIA driver, whatever this process sees of it.
fn without_device(error: &Error, is_there: bool) -> Finding {
    let found = error.to_string();
    if is_there {
        return Finding::warn(
            CHECK,
            format!("{found} But /dev/nvidiactl is there."),
            "nvidia-smi; in a container: docker run --gpus all, and see CUDA_VISIBLE_DEVICES",
        );
    }
    Finding::ok(CHECK, found)
}

fn device(ordinal: u32, facts: &Facts, (free, total): (u64, u64)) -> Finding {
    let (major, minor) = facts.capability;
    let found = format!(
        "cuda:{ordinal} {} at {}, sm_{major}{minor}, {} of {} free",
        facts.name,
        facts.pci,
        bytes(free),
        bytes(total)
    );
    match (facts.exports_descriptors, facts.exports_fabric) {
        (true, true) => Finding::ok(CHECK, format!("{found}; exports descriptors and fabric handles")),
        (true, false) => Finding::ok(CHECK, format!("{found}; exports descriptors")),
        (false, _) => Finding::warn(
            CHECK,
            format!("{found}; exports no descriptors, so processes cannot share its memory"),
            "a newer driver; until then ranks meet in pinned memory of the host",
        ),
    }
}

/// `reaches[a][b]` says whether device `a` reaches device `b`.
fn peers(reaches: &[Vec<bool>]) -> Option<Finding> {
    const CHECK: &str = "peer access";
    let count = reaches.len();
    let pairs: Vec<_> = (0..count).flat_map(|a| (a + 1..count).map(move |b| (a, b))).collect();
    let apart: Vec<_> = pairs.iter().filter(|(a, b)| !(reaches[*a][*b] && reaches[*b][*a])).collect();
    match (pairs.len(), apart.first()) {
        (0, _) => None,
        (_, None) => Some(Finding::ok(CHECK, format!("all {count} devices reach each other's memory"))),
        (all, Some((a, b))) => Some(Finding::warn(
            CHECK,
            format!(
                "{} of {all} pairs do not reach each other's memory, as cuda:{a} and cuda:{b}; ranks there meet in \
                 pinned memory of the host",
                apart.len()
            ),
            "nvidia-smi topo -p2p r; on PCIe, the IOMMU and ACS must let them",
        )),
    }
}

fn links(gpus: Result<&[GpuLinks], &Error>) -> Finding {
    let gpus = match gpus {
        Ok(gpus) => gpus,
        Err(error) => {
            return Finding::warn(NVLINK, error.to_string(), "mount libnvidia-ml.so.1 of the driver");
        }
    };
    let active = |gpu: &GpuLinks| gpu.links.iter().filter(|link| link.is_active).count();
    let inactive: Vec<String> = gpus
        .iter()
        .filter(|gpu| active(gpu) < gpu.links.len())
        .map(|gpu| format!("GPU {} at {} uses {} of {}", gpu.index, gpu.pci, active(gpu), gpu.links.len()))
        .collect();
    if !inactive.is_empty() {
        return Finding::warn(
            NVLINK,
            format!("links are inactive: {}", inactive.join(", ")),
            "nvidia-smi nvlink -s; behind switches: systemctl status nvidia-fabricmanager",
        );
    }
    let mut counts: Vec<usize> = gpus.iter().map(active).collect();
    counts.sort_unstable();
    counts.dedup();
    Finding::ok(
        NVLINK,
        match counts.as_slice() {
            [0] | [] => "none; GPUs meet on PCIe".to_owned(),
            [one] => format!("{one} per GPU, all active"),
            several => {
                let counts: Vec<String> = several.iter().map(ToString::to_string).collect();
                format!("{} per GPU, all active", counts.join(" or "))
            }
        },
    )
}

/// `found`: the version and the path of the compiler, and the architectures here that it does not compile for.
fn compiler(found: Result<(Version, String, Vec<Architecture>), Error>, driver: Version) -> Finding {
    let (version, path, missing) = match found {
        Ok(found) => found,
        Err(error) => {
            return Finding::warn(COMPILER, error.to_string(), "python3 -m pip install nvidia-cuda-nvrtc");
        }
    };
    let found = format!("NVRTC {} at {path}", dotted(version));
    let other =
        || format!("python3 -m pip install 'nvidia-cuda-nvrtc=={}.*', or UNISONO_NVRTC=PATH", driver.0);
    if !missing.is_empty() {
        let missing: Vec<String> = missing.iter().map(ToString::to_string).collect();
        return Finding::warn(
            COMPILER,
            format!("{found} does not compile for {}", missing.join(", ")),
            other(),
        );
    }
    if version.0 > driver.0 {
        let found = format!(
            "{found} is newer than CUDA {} of the driver, which may refuse its kernels",
            dotted(driver)
        );
        return Finding::warn(COMPILER, found, other());
    }
    Finding::ok(COMPILER, found)
}

fn cache(cache: &Cache) -> Finding {
    const CHECK: &str = "kernel cache";
    const MEND: &str =
        "UNISONO_CACHE_DIR=FOLDER, one that this user may write to; each process compiles otherwise";
    let Some(folder) = cache.folder() else {
        return Finding::warn(CHECK, "there is no home folder to keep kernels in", MEND);
    };
    let place = folder.display();
    let entries = match cache.entries() {
        Ok(entries) => entries,
        Err(error) => return Finding::warn(CHECK, error.to_string(), MEND),
    };
    // It is made when it is needed, in the lowest folder that is there.
    let there = folder.ancestors().find(|folder| folder.exists()).unwrap_or(folder);
    if let Err(error) = rustix::fs::access(there, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)
    {
        return Finding::warn(CHECK, format!("{place} cannot be written to: {error}"), MEND);
    }
    let size = entries.iter().map(|entry| entry.bytes).sum();
    Finding::ok(
        CHECK,
        match entries.len() {
            0 => format!(
                "{place}, empty: the first job compiles for some seconds, or unisono kernels build before it"
            ),
            1 => format!("{place}, 1 entry, {}", bytes(size)),
            count => format!("{place}, {count} entries, {}", bytes(size)),
        },
    )
}

fn dotted((major, minor): Version) -> String {
    format!("{major}.{minor}")
}

#[cfg(test)]
mod tests {
    use unisono::cuda::{Link, Remote, Uuid};

    use super::super::Verdict::{Ok as Well, Warn};
    use super::*;

    fn said(finding: &Finding) -> (super::super::Verdict, &str) {
        (finding.verdict, &finding.found)
    }

    #[test]
    fn no_device_is_no_warning_unless_the_system_has_one() {
        let none = Error::NoDevice { reason: "there is no libcuda.so on this machine".into() };
        let plain = "no CUDA device: there is no libcuda.so on this machine. Host memory works without one.";
        assert_eq!(said(&without_device(&none, false)), (Well, plain));
        assert_eq!(without_device(&none, true).verdict, Warn);
    }

    #[test]
    fn a_device_is_a_line_and_one_that_exports_nothing_is_warned_about() {
        let mut facts = Facts {
            name: "NVIDIA H200".into(),
            uuid: Uuid([1; 16]),
            pci: "0000:1b:00.0".into(),
            capability: (9, 0),
            multiprocessors: 132,
            shared_bytes: 227 << 10,
            memory_bytes: 140 << 30,
            numa_node: Some(0),
            exports_descriptors: true,
            exports_fabric: false,
            takes_host_numa: true,
        };
        let well = "cuda:3 NVIDIA H200 at 0000:1b:00.0, sm_90, 139 GiB of 140 GiB free; exports descriptors";
        let memory = (139 << 30, 140 << 30);
        assert_eq!(said(&device(3, &facts, memory)), (Well, well));
        facts.exports_descriptors = false;
        assert_eq!(device(3, &facts, memory).verdict, Warn);
    }

    #[test]
    fn it_is_said_where_forms_come_from() {
        let name = "NVIDIA H200";
        assert_eq!(said(&forms(name, 8, None)), (Well, "default, measured on 2, 4 and 8 × NVIDIA H200"));
        let host = Tuning::new("here", [].into());
        let without = forms(name, 8, Some((&host, "a.tune")));
        assert_eq!(
            said(&without),
            (Well, "default, measured on 2, 4 and 8 × NVIDIA H200; a.tune has none for GPUs")
        );
        let tables = [2, 4].map(|ranks| (ranks, tuning::device::Table::built_in(ranks)));
        let tuned = host.with_gpus(name, tables.into());
        let all = forms(name, 4, Some((&tuned, "a.tune")));
        assert_eq!(said(&all), (Well, "tuning file a.tune, measured on 2, 4 × NVIDIA H200"));
        assert_eq!(forms(name, 8, Some((&tuned, "a.tune"))).verdict, Warn);
        let foreign = forms("NVIDIA B200", 4, Some((&tuned, "a.tune")));
        assert_eq!(foreign.verdict, super::super::Verdict::Fail);
        assert!(
            foreign.found.ends_with("measured on NVIDIA H200; this machine is NVIDIA B200"),
            "{foreign:?}"
        );
    }

    #[test]
    fn devices_that_do_not_reach_each_other_are_counted() {
        assert_eq!(peers(&[vec![true]]), None);
        assert_eq!(peers(&[]), None);
        let mut reaches = vec![vec![true; 4]; 4];
        assert_eq!(said(&peers(&reaches).unwrap()), (Well, "all 4 devices reach each other's memory"));
        reaches[2][1] = false;
        let finding = peers(&reaches).unwrap();
        assert_eq!(finding.verdict, Warn);
        assert!(
            finding.found.starts_with("1 of 6 pairs do not reach each other's memory, as cuda:1 and cuda:2")
        );
    }

    #[test]
    fn inactive_links_are_named() {
        let gpu = |index: usize, inactive: usize| GpuLinks {
            index,
            uuid: format!("GPU-{index}"),
            name: "a GPU".into(),
            pci: format!("0000:0{index}:00.0"),
            numa_node: None,
            links: (0..18)
                .map(|link| Link { is_active: link >= inactive, remote: Remote::Switch, remote_pci: None })
                .collect(),
            pcie: Vec::new(),
        };
        assert_eq!(said(&links(Ok(&[gpu(0, 0), gpu(1, 0)]))), (Well, "18 per GPU, all active"));
        let warned = links(Ok(&[gpu(0, 0), gpu(1, 2)]));
        assert_eq!(said(&warned), (Warn, "links are inactive: GPU 1 at 0000:01:00.0 uses 16 of 18"));
        let plain = GpuLinks { links: Vec::new(), ..gpu(0, 0) };
        assert_eq!(said(&links(Ok(&[plain]))), (Well, "none; GPUs meet on PCIe"));
    }

    #[test]
    fn a_compiler_must_fit_the_devices_and_the_driver() {
        let found = |version, missing| Ok((version, "/lib/libnvrtc.so".to_owned(), missing));
        let well = compiler(found((12, 9), Vec::new()), (12, 4));
        assert_eq!(said(&well), (Well, "NVRTC 12.9 at /lib/libnvrtc.so"));
        let newer = compiler(found((13, 0), Vec::new()), (12, 4));
        assert_eq!(newer.verdict, Warn);
        assert!(newer.mend.unwrap().contains("nvidia-cuda-nvrtc==12.*"));
        let old = compiler(found((12, 0), vec![Architecture { major: 10, minor: 0 }]), (13, 0));
        assert!(old.verdict == Warn && old.found.ends_with("does not compile for sm_100"), "{old:?}");
        let none = compiler(Err(Error::NoCompiler { reason: "nowhere".into() }), (13, 0));
        assert!(none.verdict == Warn && none.mend.unwrap().contains("pip install"));
    }

    #[test]
    fn the_cache_is_counted_where_it_can_be_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let ours = Cache::at(folder.path().join("kernels/here"));
        assert!(cache(&ours).found.contains("empty: the first job compiles"), "{:?}", cache(&ours));
        std::fs::create_dir_all(ours.folder().unwrap()).unwrap();
        std::fs::write(ours.folder().unwrap().join("ab-13.0.cubin"), [0; 2048]).unwrap();
        assert!(cache(&ours).found.ends_with("here, 1 entry, 2 KiB"), "{:?}", cache(&ours));
        let nowhere = Cache::at("/proc/self/kernels".into());
        assert!(cache(&nowhere).verdict == Warn || rustix::process::geteuid().is_root());
    }
}
