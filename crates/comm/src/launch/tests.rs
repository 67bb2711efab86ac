//! Tests of launch detection: a map of variables in, a launch or a sentence out.

use super::*;

fn detect(pairs: &[(&str, &str)]) -> Result<Launch> {
    let lookup =
        |name: &str| pairs.iter().rev().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
    Launch::detect_below(&lookup, &|| "parent-77-1234".to_owned())
}

fn sentence(pairs: &[(&str, &str)]) -> String {
    detect(pairs).unwrap_err().to_string()
}

fn member(rank: usize, world_size: usize) -> Member {
    Member::new(rank, world_size).unwrap()
}

fn file(job: &str) -> StoreAddress {
    StoreAddress::File { job: job.to_owned() }
}

const UNISONO_RUN: &[(&str, &str)] = &[
    ("RANK", "2"),
    ("LOCAL_RANK", "2"),
    ("WORLD_SIZE", "4"),
    ("LOCAL_WORLD_SIZE", "4"),
    ("MASTER_ADDR", "127.0.0.1"),
    ("MASTER_PORT", "40001"),
    ("UNISONO_STORE", "tcp://127.0.0.1:40000"),
    ("UNISONO_JOB", "run-5f"),
    ("UNISONO_SECRET_FD", "3"),
];

const TORCHRUN: &[(&str, &str)] = &[
    ("RANK", "9"),
    ("WORLD_SIZE", "16"),
    ("LOCAL_RANK", "1"),
    ("LOCAL_WORLD_SIZE", "8"),
    ("GROUP_RANK", "1"),
    ("MASTER_ADDR", "gpu01"),
    ("MASTER_PORT", "29500"),
    ("TORCHELASTIC_RUN_ID", "a7"),
    ("TORCHELASTIC_RESTART_COUNT", "3"),
    ("TORCHELASTIC_USE_AGENT_STORE", "True"),
];

const OPEN_MPI: &[(&str, &str)] = &[
    ("OMPI_COMM_WORLD_RANK", "1"),
    ("OMPI_COMM_WORLD_SIZE", "4"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
    ("PMIX_NAMESPACE", "prterun-box-4711@1"),
];

const PMI: &[(&str, &str)] =
    &[("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "0"), ("MPI_LOCALNRANKS", "2")];

const SLURM: &[(&str, &str)] = &[
    ("SLURM_PROCID", "3"),
    ("SLURM_NTASKS", "4"),
    ("SLURM_LOCALID", "3"),
    ("SLURM_JOB_ID", "123"),
    ("SLURM_STEP_ID", "0"),
    ("SLURM_NNODES", "1"),
];

fn with<'a>(base: &[(&'a str, &'a str)], more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    base.iter().chain(more).copied().collect()
}

#[test]
fn unisono_run_gives_rank_job_and_an_authenticated_store() {
    let launch = detect(UNISONO_RUN).unwrap();
    let expected = Launch {
        launcher: Launcher::UnisonoRun,
        member: member(2, 4),
        local_rank: Some(2),
        local_world_size: Some(4),
        job: "run-5f".to_owned(),
        generation: 0,
        store: StoreAddress::Tcp { host: "127.0.0.1".to_owned(), port: 40_000 },
    };
    assert_eq!(launch, expected);
    assert!(!detect(&with(UNISONO_RUN, &[("RANK", "0")])).unwrap().serves_store());
}

#[test]
fn torchrun_gives_its_agents_store_and_counts_restarts_as_generations() {
    let launch = detect(TORCHRUN).unwrap();
    let expected = Launch {
        launcher: Launcher::Torchrun,
        member: member(9, 16),
        local_rank: Some(1),
        local_world_size: Some(8),
        job: "torchrun-a7".to_owned(),
        generation: 3,
        store: StoreAddress::TorchAgent { host: "gpu01".to_owned(), port: 29_500 },
    };
    assert_eq!(launch, expected);
}

#[test]
fn torchrun_without_an_agent_store_has_rank_zero_serve_it() {
    let pairs = with(TORCHRUN, &[("TORCHELASTIC_USE_AGENT_STORE", "False")]);
    let launch = detect(&pairs).unwrap();
    assert_eq!(launch.store, StoreAddress::TorchHosted { host: "gpu01".to_owned(), port: 29_500 });
    assert!(!launch.serves_store());
    assert!(detect(&with(&pairs, &[("RANK", "0")])).unwrap().serves_store());
}

#[test]
fn open_mpi_on_one_host_meets_in_files_of_the_job() {
    let launch = detect(OPEN_MPI).unwrap();
    let expected = Launch {
        launcher: Launcher::OpenMpi,
        member: member(1, 4),
        local_rank: Some(1),
        local_world_size: Some(4),
        job: "openmpi-prterun-box-4711@1".to_owned(),
        generation: 0,
        store: file("openmpi-prterun-box-4711@1"),
    };
    assert_eq!(launch, expected);
    let older = with(&OPEN_MPI[..4], &[("OMPI_MCA_ess_base_jobid", "99")]);
    assert_eq!(detect(&older).unwrap().job, "openmpi-99");
}

#[test]
fn pmi_jobs_without_a_name_are_told_by_their_parent() {
    let launch = detect(PMI).unwrap();
    assert_eq!((launch.launcher, launch.member), (Launcher::Pmi, member(0, 2)));
    assert_eq!((launch.local_rank, launch.local_world_size), (Some(0), Some(2)));
    assert_eq!(launch.job, "pmi-parent-77-1234");
    assert_eq!(launch.store, file("pmi-parent-77-1234"));
    assert!(!launch.serves_store());
    assert_eq!(detect(&with(PMI, &[("PMI_JOBID", "j5")])).unwrap().job, "pmi-j5");
    assert_eq!(detect(&with(PMI, &[("UNISONO_JOB", "mine")])).unwrap().store, file("mine"));
}

#[test]
fn slurm_on_one_host_meets_in_files_of_the_step() {
    let launch = detect(SLURM).unwrap();
    assert_eq!((launch.launcher, launch.member), (Launcher::Slurm, member(3, 4)));
    assert_eq!((launch.local_rank, launch.local_world_size), (Some(3), Some(4)));
    assert_eq!(launch.store, file("slurm-123.0"));
    assert_eq!(detect(&with(SLURM, &[("SLURM_RESTART_COUNT", "2")])).unwrap().job, "slurm-123.0-restart-2");
    let smaller_step = with(SLURM, &[("SLURM_NTASKS", "64"), ("SLURM_STEP_NUM_TASKS", "4")]);
    assert_eq!(detect(&smaller_step).unwrap().member, member(3, 4));
}

#[test]
fn a_slurm_batch_script_is_no_rank() {
    let script: Vec<_> = SLURM.iter().filter(|(name, _)| *name != "SLURM_STEP_ID").copied().collect();
    assert_eq!(detect(&script).unwrap_err(), Error::LaunchNothing);
}

#[test]
fn plain_variables_have_rank_zero_serve_a_store_at_the_master_address() {
    let pairs = [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "fd00::5"), ("MASTER_PORT", "29500")];
    let launch = detect(&pairs).unwrap();
    assert_eq!((launch.launcher, launch.member), (Launcher::Environment, member(0, 2)));
    assert_eq!((launch.local_rank, launch.local_world_size), (None, None));
    assert_eq!(launch.store, StoreAddress::TorchHosted { host: "fd00::5".to_owned(), port: 29_500 });
    assert!(launch.serves_store());
}

#[test]
fn a_world_of_one_needs_no_address() {
    let launch = detect(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap();
    assert_eq!(launch.store, file(&format!("default-alone-{}", std::process::id())));
}

#[test]
fn the_store_the_job_and_the_generation_can_be_overridden_for_every_launcher() {
    let more = [("UNISONO_STORE", "tcp://head:7"), ("UNISONO_JOB", "night"), ("UNISONO_GENERATION", "5")];
    let expected = StoreAddress::Tcp { host: "head".to_owned(), port: 7 };
    for base in [TORCHRUN, OPEN_MPI, PMI, SLURM, &[("RANK", "0"), ("WORLD_SIZE", "2")]] {
        let launch = detect(&with(base, &more)).unwrap();
        assert_eq!(
            (launch.store.clone(), launch.job.as_str(), launch.generation),
            (expected.clone(), "night", 5)
        );
        assert_eq!(launch.serves_store(), launch.member.rank() == 0);
    }
}

#[test]
fn the_innermost_launcher_wins() {
    let launcher = |pairs: Vec<(&str, &str)>| detect(&pairs).unwrap().launcher;
    assert_eq!(launcher(with(SLURM, TORCHRUN)), Launcher::Torchrun);
    assert_eq!(launcher(with(SLURM, OPEN_MPI)), Launcher::OpenMpi);
    assert_eq!(launcher(with(SLURM, PMI)), Launcher::Pmi);
    assert_eq!(launcher(with(SLURM, UNISONO_RUN)), Launcher::UnisonoRun);
    assert_eq!(launcher(with(SLURM, &[("WORLD_SIZE", "4")])), Launcher::Slurm);
}

#[test]
fn torchrun_below_unisono_run_does_not_use_the_outer_store() {
    let launch = detect(&with(UNISONO_RUN, TORCHRUN)).unwrap();
    assert_eq!(launch.store, StoreAddress::TorchAgent { host: "gpu01".to_owned(), port: 29_500 });
    assert_eq!((launch.job.as_str(), launch.generation), ("torchrun-a7", 3));
}

#[test]
fn several_hosts_without_a_store_are_an_error_that_says_what_to_set() {
    let help = "tells them no place to meet. Set UNISONO_STORE=tcp://HOST:PORT on all of them, with a host that all \
                can reach (for example that of rank 0) and a free port";
    for (name, pairs) in [
        ("Slurm", with(SLURM, &[("SLURM_NNODES", "2")])),
        ("Open MPI", with(OPEN_MPI, &[("OMPI_COMM_WORLD_LOCAL_SIZE", "2")])),
        ("PMI", with(PMI, &[("PMI_SIZE", "4")])),
        ("PMI", with(&PMI[..2], &[("SLURM_NNODES", "2"), ("PMI_SIZE", "4")])),
    ] {
        assert_eq!(sentence(&pairs), format!("{name} started 4 ranks on several hosts and {help}"));
        assert!(detect(&with(&pairs, &[("UNISONO_STORE", "tcp://head:7")])).is_ok());
    }
}

#[test]
fn without_any_launcher_the_sentence_says_how_to_start() {
    let looked =
        "(looked for: unisono run, torchrun, Open MPI, PMI, Slurm). Start with: unisono run -n 4 -- PROGRAM";
    assert_eq!(
        sentence(&[]),
        format!("this process is no rank of a job: RANK and WORLD_SIZE are not set {looked}")
    );
    assert_eq!(sentence(&[("RANK", ""), ("WORLD_SIZE", " ")]), sentence(&[]));
}

#[test]
fn half_of_a_pair_names_the_other_half() {
    let looked =
        "(looked for: unisono run, torchrun, Open MPI, PMI, Slurm). Start with: unisono run -n 4 -- PROGRAM";
    let cases: [(&[(&str, &str)], &str); 8] = [
        (&[("RANK", "0")], "RANK=0 is set but WORLD_SIZE is not"),
        (&[("WORLD_SIZE", "4")], "WORLD_SIZE=4 is set but RANK is not"),
        (&[("OMPI_COMM_WORLD_RANK", "1")], "OMPI_COMM_WORLD_RANK=1 is set but OMPI_COMM_WORLD_SIZE is not"),
        (&[("PMI_SIZE", "2")], "PMI_SIZE=2 is set but PMI_RANK is not"),
        (&[("SLURM_PROCID", "1"), ("SLURM_STEP_ID", "0")], "SLURM_PROCID=1 is set but SLURM_NTASKS is not"),
        (
            &[("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")],
            "MASTER_ADDR=a is set but MASTER_PORT is not",
        ),
        (
            &[("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "1")],
            "MASTER_PORT=1 is set but MASTER_ADDR is not",
        ),
        (
            &[("RANK", "0"), ("WORLD_SIZE", "2"), ("UNISONO_SECRET_FD", "3")],
            "UNISONO_SECRET_FD is set but UNISONO_STORE is not",
        ),
    ];
    for (pairs, expected) in cases {
        assert_eq!(sentence(pairs), format!("{expected} {looked}"));
    }
}

#[test]
fn several_ranks_without_an_address_are_told_what_is_missing() {
    assert_eq!(
        sentence(&[("RANK", "0"), ("WORLD_SIZE", "2")]),
        "the environment says that there are 2 ranks, but not where they meet: neither MASTER_ADDR and MASTER_PORT \
         nor UNISONO_STORE are set. Start with: unisono run -n 2 -- PROGRAM"
    );
}

#[test]
fn values_that_are_no_numbers_name_the_variable() {
    let base = [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "1")];
    for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "UNISONO_GENERATION"]
    {
        for value in ["one", "-1", "0x1", "99999999999999999999"] {
            let expected = format!("{name}={value} cannot be read: expected a whole number from 0");
            assert_eq!(sentence(&with(&base, &[(name, value)])), expected);
        }
    }
}

#[test]
fn a_rank_outside_its_world_is_refused() {
    let base = [("MASTER_ADDR", "a"), ("MASTER_PORT", "1"), ("WORLD_SIZE", "4")];
    assert_eq!(
        sentence(&with(&base, &[("RANK", "4")])),
        "RANK=4 does not fit WORLD_SIZE=4: ranks go from 0 to WORLD_SIZE − 1"
    );
    assert_eq!(
        sentence(&with(&base, &[("RANK", "0"), ("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "2")])),
        "LOCAL_RANK=2 does not fit LOCAL_WORLD_SIZE=2: ranks go from 0 to LOCAL_WORLD_SIZE − 1"
    );
    let huge = with(&base, &[("RANK", "0"), ("WORLD_SIZE", "70000")]);
    assert!(sentence(&huge).starts_with("rank 0 cannot be in a world of 70000"), "{}", sentence(&huge));
}

#[test]
fn a_store_that_is_no_address_is_refused() {
    let pairs = with(OPEN_MPI, &[("UNISONO_STORE", "head:29500")]);
    assert_eq!(
        sentence(&pairs),
        "UNISONO_STORE=head:29500 cannot be read: expected tcp://HOST:PORT, torch://HOST:PORT or file:///PATH"
    );
}

#[test]
fn the_parent_is_told_by_pid_and_start_time() {
    let parent = parent_process();
    let pid = std::os::unix::process::parent_id().to_string();
    let parts: Vec<&str> = parent.split('-').collect();
    assert_eq!((parts[0], parts[1]), ("parent", pid.as_str()));
    assert!(parts[2].parse::<u64>().unwrap() > 0, "{parent}");
}
