//! Tests the detection with complete, incomplete and contradictory variables of every launcher.

use proptest::prelude::*;

use super::*;
use crate::secret::ShortSecret;

const SECRET: &str = "0123456789abcdef";

fn vars(text: &str) -> Variables {
    text.split_whitespace().map(|pair| pair.split_once('=').unwrap()).map(|(n, v)| (n.into(), v.into())).collect()
}

fn with_secret(text: &str) -> Variables {
    let mut all = vars(text);
    all.insert("SHARDFLOW_SECRET".into(), SECRET.into());
    all
}

fn world(text: &str) -> Launched {
    match detect(&with_secret(text)) {
        Ok(LaunchContext::World(world)) => world,
        other => panic!("{text}: {other:?}"),
    }
}

fn error(text: &str) -> String {
    detect(&with_secret(text)).expect_err(text).to_string()
}

/// Formats a context as `process/processes local/locals node endpoint restart run_id`.
fn summary(text: &str) -> String {
    let w = world(text);
    format!(
        "{}/{} {}/{} {:?} {} {} {}",
        w.process, w.processes, w.local_process, w.local_processes, w.node, w.endpoint, w.restart, w.run_id
    )
}

const LAUNCHER: &str = "SHARDFLOW_RANK=3 SHARDFLOW_WORLD_SIZE=4 SHARDFLOW_LOCAL_RANK=1 SHARDFLOW_LOCAL_WORLD_SIZE=2 \
     SHARDFLOW_ENDPOINT=tcp://a:5";
const TORCHRUN: &str = "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=5";
const OPENMPI: &str = "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 \
     OMPI_COMM_WORLD_LOCAL_SIZE=2 SHARDFLOW_ENDPOINT=tcp://a:5";
const SLURM: &str = "SLURM_STEP_ID=0 SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=0 SLURM_NODEID=1 SLURM_JOB_ID=77 \
     SLURM_TASKS_PER_NODE=3,1 SLURM_JOB_NODELIST=n[08-09]";
const MPICH: &str = "PMI_RANK=3 PMI_SIZE=4 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2 SHARDFLOW_ENDPOINT=tcp://a:5";
/// The variables that a PyTorchJob sets in each pod.
const POD: &str = "RANK=3 WORLD_SIZE=4 MASTER_ADDR=job-master-0 MASTER_PORT=5";
const KUBERNETES: &str = "JOB_COMPLETION_INDEX=1 SHARDFLOW_NNODES=2 SHARDFLOW_ENDPOINT=tcp://job-0-0.job:5";

#[test]
fn each_launcher_is_detected() {
    assert_eq!(detect(&vars("PATH=/bin MASTER_ADDR=a SLURM_JOB_ID=1")).unwrap(), LaunchContext::Local);
    assert_eq!(summary(LAUNCHER), "3/4 1/2 None tcp://a:5 0 none");
    let more = "SHARDFLOW_NODE_RANK=1 SHARDFLOW_RESTART_COUNT=2 SHARDFLOW_RUN_ID=x";
    assert_eq!(summary(&format!("{LAUNCHER} {more}")), "3/4 1/2 Some(1) tcp://a:5 2 x");
    assert_eq!(summary(TORCHRUN), "3/4 1/2 None tcp://a:5 0 none");
    let more = "GROUP_RANK=1 TORCHELASTIC_RESTART_COUNT=2 TORCHELASTIC_RUN_ID=x MASTER_ADDR=fe80::1";
    assert_eq!(summary(&format!("{TORCHRUN} {more}")), "3/4 1/2 Some(1) tcp://[fe80::1]:5 2 x");
    let zoned = format!("{TORCHRUN} MASTER_ADDR=fe80::1%lo");
    assert_eq!(summary(&zoned), "3/4 1/2 None tcp://[fe80::1%lo]:5 0 none");
    assert_eq!(summary(&format!("{TORCHRUN} MASTER_ADDR=[::1]")), "3/4 1/2 None tcp://[::1]:5 0 none");
    assert_eq!(summary(OPENMPI), "3/4 1/2 None tcp://a:5 0 none");
    assert_eq!(summary(KUBERNETES), "1/2 0/1 Some(1) tcp://job-0-0.job:5 0 none");
    assert_eq!(summary(MPICH), "3/4 1/2 None tcp://a:5 0 none");
    assert_eq!(summary(POD), "3/4 0/1 None tcp://job-master-0:5 0 none");
    let master = "RANK=0 WORLD_SIZE=4 MASTER_ADDR=localhost MASTER_PORT=5";
    assert_eq!(summary(master), "0/4 0/1 None tcp://0.0.0.0:5 0 none", "the master listens on all addresses");
    assert_eq!(summary(&master.replace("RANK=0", "RANK=1")), "1/4 0/1 None tcp://localhost:5 0 none");
    assert_eq!(summary("RANK=1 WORLD_SIZE=2 SHARDFLOW_ENDPOINT=tcp://b:6"), "1/2 0/1 None tcp://b:6 0 none");
    assert!(error("RANK=1 WORLD_SIZE=2").contains("MASTER_ADDR is not"));
    assert_eq!(world(SLURM).source, LaunchedBy::Slurm);
    let port = match world(SLURM).endpoint {
        Endpoint::Tcp { host, port } if host == "n08" => port,
        other => panic!("{other}"),
    };
    assert!((20000..30000).contains(&port));
    assert_eq!(summary(SLURM), format!("3/4 0/1 Some(1) tcp://n08:{port} 0 77.0"));
}

#[test]
fn the_innermost_launcher_wins() {
    let all = format!("{LAUNCHER} {TORCHRUN} {OPENMPI} {SLURM} JOB_COMPLETION_INDEX=1 SHARDFLOW_NNODES=2");
    assert_eq!(world(&all).source, LaunchedBy::Shardflow);
    let all = format!("{TORCHRUN} {OPENMPI} {SLURM} JOB_COMPLETION_INDEX=1 SHARDFLOW_NNODES=2");
    assert_eq!(world(&all).source, LaunchedBy::Torchrun);
    // A helper of mpirun is task 0 of a Slurm step. The step's size is 1 or differs from the number of processes.
    assert_eq!(world(&format!("{OPENMPI} {SLURM} SLURM_PROCID=0 SLURM_NTASKS=2")).source, LaunchedBy::OpenMpi);
    assert_eq!(world(&format!("{SLURM} JOB_COMPLETION_INDEX=1")).source, LaunchedBy::Slurm);
    for unset in ["", "RANK= LOCAL_RANK="] {
        let found = summary(&format!("{SLURM} {unset} SHARDFLOW_ENDPOINT=tcp://b:6"));
        assert_eq!(found, "3/4 0/1 Some(1) tcp://b:6 0 77.0", "{unset}");
    }
}

#[test]
fn mpich_and_intel_mpi_are_distinguished_from_slurm() {
    // `srun --mpi=pmi2` also sets these variables.
    let pmi2 = "PMI_RANK=3 PMI_SIZE=4 PMI_FD=9 PMI_JOBID=77.0";
    assert_eq!(world(&format!("{SLURM} {pmi2}")).source, LaunchedBy::Slurm);
    assert_eq!(world(&format!("{SLURM} {MPICH}")).source, LaunchedBy::Slurm, "the world sizes are equal");
    // Hydra starts one helper per node, as a Slurm task.
    let helper = SLURM.replace("SLURM_PROCID=3 SLURM_NTASKS=4", "SLURM_PROCID=1 SLURM_NTASKS=2");
    assert_eq!(world(&format!("{helper} {MPICH}")).source, LaunchedBy::Mpich);
    assert_eq!(world(&format!("{OPENMPI} {MPICH}")).source, LaunchedBy::OpenMpi);
    assert_eq!(world(&format!("{MPICH} JOB_COMPLETION_INDEX=1 SHARDFLOW_NNODES=2")).source, LaunchedBy::Mpich);

    let one_node = "PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2";
    let endpoint = |text: &str| world(text).endpoint.to_string();
    assert!(endpoint(one_node).starts_with("tcp://127.0.0.1:2"), "{}", endpoint(one_node));
    let [first, second] = ["n:1", "n:2"].map(|port| endpoint(&format!("{one_node} PMI_PORT={port}")));
    assert_ne!(first, second, "two jobs on one node use different ports");
    assert_eq!(endpoint(&format!("{one_node} MASTER_ADDR=a MASTER_PORT=7")), "tcp://a:7");
    let without = MPICH.replace("SHARDFLOW_ENDPOINT=tcp://a:5", "");
    assert!(error(&without).contains("mpiexec -genv SHARDFLOW_ENDPOINT"), "{}", error(&without));
    let message = detect(&vars(one_node)).unwrap_err().to_string();
    assert!(message.contains("mpiexec -genv SHARDFLOW_SECRET"), "{message}");
}

#[test]
fn slurm_without_a_step_is_local() {
    for text in [
        "SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_LOCALID=0 SLURM_NODEID=0",
        "SLURM_STEP_ID=4294967290 SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=1",
        "SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=1",
        "SLURM_STEP_ID=0 SLURM_PROCID=0",
    ] {
        assert_eq!(detect(&vars(text)).unwrap(), LaunchContext::Local, "{text}");
    }
}

#[test]
fn a_slurm_step_on_one_node_uses_loopback_and_its_own_port() {
    let text = "SLURM_STEP_ID=2 SLURM_PROCID=1 SLURM_NTASKS=8 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=1 SLURM_NODEID=0 \
         SLURM_JOB_ID=77 SLURM_TASKS_PER_NODE=8 SLURM_STEP_TASKS_PER_NODE=2 SLURM_RESTART_COUNT=3";
    let w = world(text);
    assert_eq!((w.process, w.processes, w.local_processes, w.restart), (1, 2, 2, 3));
    assert!(w.endpoint.to_string().starts_with("tcp://127.0.0.1:2"), "one node uses loopback: {}", w.endpoint);
    let other_step = world(&text.replace("STEP_ID=2", "STEP_ID=3"));
    assert_ne!(w.endpoint, other_step.endpoint, "two steps of a job do not share a port");
}

#[test]
fn a_single_process_is_local() {
    for text in [
        "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1",
        "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=1",
        "JOB_COMPLETION_INDEX=5 SHARDFLOW_NNODES=1",
        "PMI_RANK=0 PMI_SIZE=1 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=1",
        "PMI_RANK=0 PMI_SIZE=1",
        // A PyTorchJob that has only a master.
        "RANK=0 WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=23456",
    ] {
        assert_eq!(detect(&vars(text)).unwrap(), LaunchContext::Local, "{text}");
    }
}

/// Any subset of a launcher's variables gives a local process, a world, or an error about a missing variable.
#[test]
fn incomplete_variables_are_refused() {
    for (whole, extras) in [
        (LAUNCHER, "SHARDFLOW_ENDPOINT"),
        (TORCHRUN, "MASTER_ADDR MASTER_PORT"),
        (OPENMPI, "SHARDFLOW_ENDPOINT OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE"),
        (MPICH, "SHARDFLOW_ENDPOINT"),
        (POD, "MASTER_ADDR MASTER_PORT"),
        (KUBERNETES, "SHARDFLOW_ENDPOINT SHARDFLOW_NNODES"),
    ] {
        let whole: Vec<(String, String)> = vars(whole).into_iter().collect();
        for subset in 0..1u32 << whole.len() {
            let chosen: Variables =
                (0..whole.len()).filter(|i| subset >> i & 1 == 1).map(|i| whole[i].clone()).collect();
            let mut all = chosen.clone();
            all.insert("SHARDFLOW_SECRET".into(), SECRET.into());
            match detect(&all) {
                // If both local variables are missing, torchrun's variables describe a pod.
                Ok(LaunchContext::World(_)) if !chosen.keys().any(|name| name.starts_with("LOCAL_")) => {
                    assert!(chosen.len() == whole.len() || vars(POD).keys().eq(chosen.keys()), "{chosen:?}");
                }
                Ok(LaunchContext::World(_)) => assert_eq!(chosen.len(), whole.len(), "{chosen:?}"),
                Ok(LaunchContext::Local) => assert!(chosen.keys().all(|name| extras.contains(name)), "{chosen:?}"),
                Err(EnvError::HalfSet { found, missing, .. }) => {
                    assert!(chosen.contains_key(found) && !chosen.contains_key(missing), "{chosen:?}");
                }
                Err(error) => panic!("{chosen:?}: {error}"),
            }
        }
    }
}

/// Tests every combination of rank, size, local rank and local size up to 4.
#[test]
fn contradictory_ranks_and_sizes_are_refused() {
    for n in 0..5u32.pow(4) {
        let (rank, size, local, locals) = (n % 5, n / 5 % 5, n / 25 % 5, n / 125);
        let text = format!(
            "RANK={rank} WORLD_SIZE={size} LOCAL_RANK={local} LOCAL_WORLD_SIZE={locals} MASTER_ADDR=a MASTER_PORT=5"
        );
        match detect(&with_secret(&text)) {
            Ok(launch) => {
                assert!(rank < size && local < locals && locals <= size, "{text}");
                assert_eq!(launch == LaunchContext::Local, size == 1, "{text}");
            }
            Err(EnvError::Contradiction { .. }) => assert!(rank >= size || local >= locals || locals > size, "{text}"),
            Err(error) => panic!("{text}: {error}"),
        }
    }
}

#[test]
fn errors_name_the_variable_its_value_and_the_fix() {
    let half = "RANK=3 is set but WORLD_SIZE is not: set WORLD_SIZE to the number of processes, or unset RANK";
    assert_eq!(error("RANK=3"), half);
    assert_eq!(error("RANK=x"), "RANK=x: must be a whole number, not negative");
    assert_eq!(
        error("RANK=4 WORLD_SIZE=4 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1"),
        "RANK=4 contradicts WORLD_SIZE=4: ranks begin at 0 and are below the number of processes"
    );
    assert!(error("JOB_COMPLETION_INDEX=0").starts_with(
        "JOB_COMPLETION_INDEX=0 is set but SHARDFLOW_NNODES is not: set SHARDFLOW_NNODES to the number of pods"
    ));
    assert!(error(&format!("{SLURM} SLURM_TASKS_PER_NODE=2(x3)")).contains("must add up"));
    assert!(error(&format!("{SLURM} SLURM_NODEID=2")).contains("SLURM_NODEID=2 contradicts SLURM_TASKS_PER_NODE=3,1"));
    assert!(error(&format!("{SLURM} SLURM_LOCALID=1")).contains("SLURM_LOCALID=1 contradicts"));
    assert!(error(&format!("{SLURM} SLURM_JOB_NODELIST=n[8")).contains("SLURM_JOB_NODELIST=n[8: not a list of hosts"));
    assert!(error(&format!("{LAUNCHER} SHARDFLOW_ENDPOINT=a:5")).contains("SHARDFLOW_ENDPOINT=a:5: expected"));
    assert!(error(&format!("{LAUNCHER} SHARDFLOW_ENDPOINT=unix:/x")).contains("one node only"));
    assert!(error(&format!("{TORCHRUN} MASTER_PORT=0")).contains("MASTER_PORT=0"));
    let without = OPENMPI.replace("SHARDFLOW_ENDPOINT=tcp://a:5", "");
    assert!(error(&without).contains("mpirun -x SHARDFLOW_ENDPOINT"), "{}", error(&without));
}

#[test]
fn several_processes_need_a_secret() {
    for text in [LAUNCHER, TORCHRUN, POD, OPENMPI, SLURM, MPICH, KUBERNETES] {
        let error = detect(&vars(text)).unwrap_err();
        assert!(matches!(error, EnvError::NoSecret { .. }), "{text}: {error}");
        assert_eq!(error.exit().code(), 78);
    }
    let short = detect(&vars(&format!("{TORCHRUN} SHARDFLOW_SECRET=tooshort"))).unwrap_err().to_string();
    assert!(short.contains("holds a secret of 8 characters") && !short.contains("tooshort"), "{short}");
    let both = detect(&with_secret(&format!("{TORCHRUN} SHARDFLOW_SECRET_FILE=/a"))).unwrap_err();
    assert!(both.to_string().contains("set only one of the two") && !both.to_string().contains(SECRET), "{both}");
    assert!(!format!("{:?}", world(TORCHRUN)).contains(SECRET), "debug output hides the secret");
}

#[test]
fn a_secret_is_read_from_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("secret");
    let source = SecretSource::find(&vars(&format!("SHARDFLOW_SECRET_FILE={}", path.display()))).unwrap().unwrap();
    assert!(source.read().unwrap_err().to_string().contains("SHARDFLOW_SECRET_FILE="));
    std::fs::write(&path, format!("{SECRET}\n")).unwrap();
    assert_eq!(source.read().unwrap().text(), SECRET);
    std::fs::write(&path, "short").unwrap();
    assert!(matches!(source.read(), Err(EnvError::ShortSecret { source: ShortSecret { chars: 5 }, .. })));
}

proptest! {
    /// No value of any variable causes a panic, and an accepted world is consistent.
    #[test]
    fn no_environment_makes_detection_panic(
        chosen in prop::collection::vec((0usize..40, "[0-9]{1,2}|[a-z\\[\\]:/,()-]{0,6}|tcp://a:5|2\\(x2\\)"), 0..12),
        whole in 0usize..8,
    ) {
        let base = [LAUNCHER, TORCHRUN, POD, OPENMPI, SLURM, MPICH, KUBERNETES, ""];
        let mut all = with_secret(base[whole]);
        let names: Vec<String> = base.iter().flat_map(|text| vars(text).into_keys()).collect();
        for (i, value) in chosen {
            all.insert(names[i % names.len()].clone(), value);
        }
        if let Ok(LaunchContext::World(w)) = detect(&all) {
            prop_assert!(w.process < w.processes && w.local_process < w.local_processes);
            prop_assert!(w.local_processes <= w.processes);
        }
    }
}

/// The variables that Slurm 22.05 set on two nodes: in an `sbatch` script, and in the last task of its `srun -n 3`.
#[test]
fn variables_recorded_from_slurm_are_detected() {
    let job = "SLURM_JOB_ID=1 SLURM_JOBID=1 SLURM_NNODES=2 SLURM_JOB_NODELIST=n[01-02] SLURM_NODELIST=n[01-02] \
         SLURM_NTASKS_PER_NODE=2 SLURM_CPUS_ON_NODE=2 SLURM_JOB_CPUS_PER_NODE=2(x2)";
    let script =
        "SLURM_NTASKS=4 SLURM_NPROCS=4 SLURM_TASKS_PER_NODE=2(x2) SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0";
    assert_eq!(detect(&vars(&format!("{job} {script}"))).unwrap(), LaunchContext::Local);
    let task = "SLURM_NTASKS=3 SLURM_NPROCS=3 SLURM_STEP_NUM_TASKS=3 SLURM_TASKS_PER_NODE=2,1 SLURM_PROCID=2 \
         SLURM_STEP_TASKS_PER_NODE=2,1 SLURM_STEP_NODELIST=n[01-02] SLURM_STEP_NUM_NODES=2 SLURM_STEP_ID=1 \
         SLURM_STEPID=1 SLURM_LOCALID=0 SLURM_NODEID=1";
    let summary = summary(&format!("{job} {task}"));
    assert!(summary.starts_with("2/3 0/1 Some(1) tcp://n01:2") && summary.ends_with(" 0 1.1"), "{summary}");
}

#[test]
fn incomplete_slurm_variables_are_refused_or_local() {
    for removed in SLURM.split_whitespace() {
        let name = removed.split('=').next().unwrap();
        let remaining: Vec<&str> = SLURM.split_whitespace().filter(|pair| *pair != removed).collect();
        match detect(&with_secret(&remaining.join(" "))) {
            Ok(LaunchContext::Local) => {
                assert!(["SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS"].contains(&name), "without {name}");
            }
            Err(EnvError::HalfSet { missing, .. }) => {
                assert_eq!(missing.replace("STEP_TASKS", "TASKS").replace("STEP_NODE", "JOB_NODE"), name);
            }
            other => panic!("without {name}: {other:?}"),
        }
    }
}
