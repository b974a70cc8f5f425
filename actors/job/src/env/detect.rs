//! Reads each launcher's variables.

use std::ops::Range;
use std::str::FromStr;

use super::context::{LaunchContext, Launched, LaunchedBy};
use super::endpoint::Endpoint;
use super::error::{EnvError, contradiction, invalid};
use super::names::{Variables, get};
use super::secret_source::SecretSource;
use super::slurm::{first_host, tasks_per_node};

/// Ports derived from a job's name. They are below Linux's ephemeral ports (from 32768) and Kubernetes's node ports
/// (from 30000).
pub const DERIVED_PORTS: Range<u16> = 20000..30000;

/// Detects how a process with these variables was started.
pub fn detect(variables: &Variables) -> Result<LaunchContext, EnvError> {
    let Some((source, found)) = find_launcher(variables) else { return Ok(LaunchContext::Local) };
    let vars = Reader { variables, found };
    let place = place(source, &vars)?;
    // A single process needs no rendezvous and no secret, but under `shardflow launch` it has both and a restart count.
    if place.processes == 1 && source != LaunchedBy::Shardflow {
        return Ok(LaunchContext::Local);
    }
    let endpoint = match vars.get("SHARDFLOW_ENDPOINT") {
        Some(text) => {
            Endpoint::parse(text).map_err(|e| invalid("SHARDFLOW_ENDPOINT", text, &format!("expected {e}")))?
        }
        None => derived_endpoint(source, &vars, &place)?,
    };
    if matches!(endpoint, Endpoint::Unix(_)) && place.local_processes < place.processes {
        let rule = "a Unix socket reaches the processes of one node only: use tcp://HOST:PORT";
        return Err(contradiction(("SHARDFLOW_ENDPOINT", endpoint), (place.processes_name, place.processes), rule));
    }
    let Some(secret) = SecretSource::find(variables)? else {
        let (launcher, instructions) = source.texts();
        return Err(EnvError::NoSecret { launcher, processes: place.processes, instructions });
    };
    let restart = names(source).restart.map_or(Ok(None), |name| vars.optional(name))?.unwrap_or(0);
    let run_id = run_id(source, &vars);
    let Place { process, processes, local_process, local_processes, node, .. } = place;
    let world = Launched {
        process,
        processes,
        local_process,
        local_processes,
        node,
        endpoint,
        secret,
        restart,
        source,
        run_id,
    };
    Ok(LaunchContext::World(world))
}

/// Each launcher's variables for the rank, the world size, the local rank and the local world size.
const SHARDFLOW: [&str; 4] =
    ["SHARDFLOW_RANK", "SHARDFLOW_WORLD_SIZE", "SHARDFLOW_LOCAL_RANK", "SHARDFLOW_LOCAL_WORLD_SIZE"];
const TORCHRUN: [&str; 4] = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"];
const MPICH: [&str; 4] = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"];
const OPENMPI: [&str; 4] =
    ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"];

/// Names of a launcher's variables, except those for ranks and sizes.
struct Names {
    /// If any of these variables is set, this launcher may have started the process.
    markers: &'static [&'static str],
    /// The variable with the number of restarts. `None` for MPI, which never restarts a process, and for a pod, which
    /// does not get its restart count.
    restart: Option<&'static str>,
    /// The variables whose values make up the job's name.
    run_id: &'static [&'static str],
}

fn names(source: LaunchedBy) -> Names {
    let (markers, restart, run_id): (&[_], _, &[_]) = match source {
        LaunchedBy::Shardflow => (&SHARDFLOW, Some("SHARDFLOW_RESTART_COUNT"), &["SHARDFLOW_RUN_ID"]),
        LaunchedBy::Torchrun => (&TORCHRUN, Some("TORCHELASTIC_RESTART_COUNT"), &["TORCHELASTIC_RUN_ID"]),
        LaunchedBy::OpenMpi => (&OPENMPI[..2], None, &["PMIX_NAMESPACE"]),
        LaunchedBy::Slurm => (&["SLURM_STEP_ID"], Some("SLURM_RESTART_COUNT"), &["SLURM_JOB_ID", "SLURM_STEP_ID"]),
        LaunchedBy::Mpich => (&MPICH, None, &["PMI_JOBID"]),
        LaunchedBy::Kubernetes => (&["JOB_COMPLETION_INDEX"], None, &["SHARDFLOW_RUN_ID"]),
    };
    Names { markers, restart, run_id }
}

/// Returns the innermost launcher, and the first of its marker variables that is set. OpenMPI is checked before Slurm:
/// `mpirun` starts its helpers on other nodes with `srun`, so the processes of `mpirun` inherit Slurm variables that
/// describe the helper. MPICH is checked after Slurm, because `srun --mpi=pmi2` also sets `PMI_*`.
fn find_launcher(variables: &Variables) -> Option<(LaunchedBy, &'static str)> {
    use LaunchedBy::{Kubernetes, Mpich, OpenMpi, Shardflow, Slurm, Torchrun};
    let is = |name: &str, value: &str| get(variables, name) == Some(value);
    let (tasks, has) = (slurm_tasks(variables).1, |name: &str| get(variables, name).is_some());
    // MPICH's launcher Hydra also starts helpers with `srun`. Only Hydra sets `MPI_LOCALNRANKS`. If the world sizes of
    // Hydra and Slurm differ, the Slurm variables describe a helper.
    let is_helper = || has("MPI_LOCALNRANKS") && has("PMI_SIZE") && !is("PMI_SIZE", tasks);
    [Shardflow, Torchrun, OpenMpi, Slurm, Mpich, Kubernetes].into_iter().find_map(|source| {
        let marker = names(source).markers.iter().find(|name| has(name))?;
        let is_launcher = match source {
            // Excludes an sbatch script, which runs outside of any step, and the only task of an interactive step.
            Slurm => has("SLURM_PROCID") && tasks != "1" && !is_helper(),
            Mpich => !is("PMI_SIZE", "1"),
            _ => true,
        };
        is_launcher.then_some((source, *marker))
    })
}

/// The variable with a step's task count, and its value. `SLURM_NTASKS` may count the tasks of the whole job.
fn slurm_tasks(variables: &Variables) -> (&'static str, &str) {
    let names = ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"];
    names.into_iter().find_map(|name| Some((name, get(variables, name)?))).unwrap_or(("SLURM_NTASKS", "1"))
}

/// Reads the variables of a launcher. `found` is the variable by which the launcher was detected.
struct Reader<'a> {
    variables: &'a Variables,
    found: &'static str,
}

impl<'a> Reader<'a> {
    fn get(&self, name: &str) -> Option<&'a str> {
        get(self.variables, name)
    }

    fn need(&self, name: &'static str, meaning: &'static str) -> Result<&'a str, EnvError> {
        self.get(name).ok_or_else(|| self.missing(name, meaning))
    }

    fn missing(&self, missing: &'static str, meaning: &'static str) -> EnvError {
        let value = self.get(self.found).unwrap_or("").into();
        EnvError::HalfSet { found: self.found, value, missing, meaning }
    }

    fn number(&self, name: &'static str, meaning: &'static str) -> Result<u32, EnvError> {
        parse(name, self.need(name, meaning)?)
    }

    fn optional<T: FromStr>(&self, name: &'static str) -> Result<Option<T>, EnvError> {
        self.get(name).map(|text| parse(name, text)).transpose()
    }
}

fn parse<T: FromStr>(name: &'static str, text: &str) -> Result<T, EnvError> {
    text.parse().map_err(|_| invalid(name, text, "must be a whole number, not negative"))
}

/// Ranks and sizes of a process, and the name of the variable with the world size.
struct Place {
    process: u32,
    processes: u32,
    processes_name: &'static str,
    local_process: u32,
    local_processes: u32,
    node: Option<u32>,
}

fn place(source: LaunchedBy, vars: &Reader) -> Result<Place, EnvError> {
    match source {
        LaunchedBy::Shardflow => checked_place(SHARDFLOW, vars, vars.optional("SHARDFLOW_NODE_RANK")?),
        LaunchedBy::Torchrun => checked_place(TORCHRUN, vars, vars.optional("GROUP_RANK")?),
        LaunchedBy::Mpich => checked_place(MPICH, vars, None),
        LaunchedBy::OpenMpi => checked_place(OPENMPI, vars, None),
        LaunchedBy::Slurm => slurm_place(vars),
        LaunchedBy::Kubernetes => kubernetes_place(vars),
    }
}

/// True in a PyTorchJob. A PyTorchJob starts one process per pod. It sets all of torchrun's variables except those for
/// the local rank and the local world size.
fn is_pod(vars: &Reader) -> bool {
    vars.get("LOCAL_RANK").is_none() && vars.get("LOCAL_WORLD_SIZE").is_none()
}

fn checked_place(names: [&'static str; 4], vars: &Reader, node: Option<u32>) -> Result<Place, EnvError> {
    let [rank, size, local_rank, local_size] = names;
    let process = vars.number(rank, "the rank of this process, from 0")?;
    let processes = vars.number(size, "the number of processes")?;
    let (local_process, local_processes) = if rank == "RANK" && is_pod(vars) {
        (0, 1)
    } else {
        let local_process = vars.number(local_rank, "the rank of this process on its node, from 0")?;
        (local_process, vars.number(local_size, "the number of processes on this node")?)
    };
    let range_rule = "ranks begin at 0 and are below the number of processes";
    if process >= processes {
        return Err(contradiction((rank, process), (size, processes), range_rule));
    }
    if local_process >= local_processes {
        return Err(contradiction((local_rank, local_process), (local_size, local_processes), range_rule));
    }
    if local_processes > processes {
        let rule = "a node cannot have more processes than the world";
        return Err(contradiction((local_size, local_processes), (size, processes), rule));
    }
    Ok(Place { process, processes, processes_name: size, local_process, local_processes, node })
}

fn slurm_place(vars: &Reader) -> Result<Place, EnvError> {
    let process = vars.number("SLURM_PROCID", "the number of this task, by starting it with srun")?;
    let (processes_name, text) = slurm_tasks(vars.variables);
    let processes = parse(processes_name, text)?;
    let local_process =
        vars.number("SLURM_LOCALID", "the number of this task on its node, by starting it with srun")?;
    let node = vars.number("SLURM_NODEID", "the number of this node, by starting the task with srun")?;
    let range_rule = "task numbers begin at 0 and are below the number of tasks";
    if process >= processes {
        return Err(contradiction(("SLURM_PROCID", process), (processes_name, processes), range_rule));
    }
    const PER_NODE: [&str; 2] = ["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"];
    let per_node_name = PER_NODE.into_iter().find(|name| vars.get(name).is_some()).unwrap_or(PER_NODE[0]);
    let list = vars.need(per_node_name, "the task count per node, such as 2(x3),1, by starting the task with srun")?;
    let tasks = tasks_per_node(list).map_err(|e| invalid(per_node_name, list, e))?;
    if tasks.iter().map(|count| u64::from(*count)).sum::<u64>() != u64::from(processes) {
        let rule = "the tasks of all nodes must add up to the number of tasks";
        return Err(contradiction((per_node_name, list), (processes_name, processes), rule));
    }
    let Some(&local_processes) = tasks.get(node as usize) else {
        let rule = "the node's number must be below the number of nodes";
        return Err(contradiction(("SLURM_NODEID", node), (per_node_name, list), rule));
    };
    if local_process >= local_processes {
        return Err(contradiction(("SLURM_LOCALID", local_process), (per_node_name, list), range_rule));
    }
    Ok(Place { process, processes, processes_name, local_process, local_processes, node: Some(node) })
}

/// Reads the rank and sizes of a pod's only process. To run several processes in a pod, use `shardflow launch`.
fn kubernetes_place(vars: &Reader) -> Result<Place, EnvError> {
    let process = vars.number("JOB_COMPLETION_INDEX", "the number of this pod")?;
    let meaning = "the number of pods of the job (or to 1, if each pod trains on its own)";
    let processes = vars.number("SHARDFLOW_NNODES", meaning)?;
    // A pod whose world size is 1 trains alone. Its index may exceed that size.
    if process >= processes && processes != 1 {
        let rule = "the index of a pod is below the number of pods";
        return Err(contradiction(("JOB_COMPLETION_INDEX", process), ("SHARDFLOW_NNODES", processes), rule));
    }
    let processes_name = "SHARDFLOW_NNODES";
    Ok(Place { process, processes, processes_name, local_process: 0, local_processes: 1, node: Some(process) })
}

/// Derives the address of process 0 from the launcher's variables. Called only if `SHARDFLOW_ENDPOINT` is not set.
fn derived_endpoint(source: LaunchedBy, vars: &Reader, place: &Place) -> Result<Endpoint, EnvError> {
    let missing = |meaning| Err(vars.missing("SHARDFLOW_ENDPOINT", meaning));
    match source {
        LaunchedBy::Shardflow => missing("tcp://HOST:PORT or unix:PATH"),
        LaunchedBy::Torchrun => master_endpoint(vars),
        LaunchedBy::OpenMpi | LaunchedBy::Mpich if vars.get("MASTER_ADDR").or(vars.get("MASTER_PORT")).is_some() => {
            master_endpoint(vars)
        }
        LaunchedBy::OpenMpi | LaunchedBy::Mpich if place.local_processes == place.processes => {
            let jobs = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_PORT", "PMI_JOBID"];
            let job = jobs.into_iter().find_map(|name| vars.get(name));
            Ok(Endpoint::Tcp { host: "127.0.0.1".into(), port: derived_port(job.unwrap_or("")) })
        }
        LaunchedBy::OpenMpi => {
            missing("tcp://HOST:PORT of the node of process 0, with `mpirun -x SHARDFLOW_ENDPOINT=..`")
        }
        LaunchedBy::Mpich => {
            missing("tcp://HOST:PORT of the node of process 0, with `mpiexec -genv SHARDFLOW_ENDPOINT tcp://HOST:PORT`")
        }
        LaunchedBy::Slurm => slurm_endpoint(vars, place),
        LaunchedBy::Kubernetes => missing("tcp://HOST:PORT, where HOST is the DNS name of the job's first pod"),
    }
}

fn master_endpoint(vars: &Reader) -> Result<Endpoint, EnvError> {
    let host = match vars.need("MASTER_ADDR", "the host of process 0")? {
        // In a PyTorchJob, `MASTER_ADDR` is `localhost` in the master pod, and the master's name in the other pods.
        "localhost" if is_pod(vars) && vars.get("RANK") == Some("0") => "0.0.0.0",
        // `MASTER_ADDR` may be an IPv6 address with or without brackets.
        host => host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host),
    };
    let port = vars.need("MASTER_PORT", "a free port on the host of process 0")?;
    match port.parse::<u16>() {
        Ok(port) if port > 0 => {
            let unchecked = Endpoint::Tcp { host: host.into(), port };
            let checked = Endpoint::parse(&unchecked.to_string());
            checked.map_err(|e| invalid("MASTER_ADDR", host, &format!("expected {e}")))
        }
        _ => Err(invalid("MASTER_PORT", port, "must be a port from 1 to 65535")),
    }
}

fn slurm_endpoint(vars: &Reader, place: &Place) -> Result<Endpoint, EnvError> {
    let job = vars.need("SLURM_JOB_ID", "the job's number, by starting the task with srun")?;
    let port = derived_port(&run_id(LaunchedBy::Slurm, vars));
    let _: u64 = parse("SLURM_JOB_ID", job)?;
    if place.local_processes == place.processes {
        return Ok(Endpoint::Tcp { host: "127.0.0.1".into(), port });
    }
    const LISTS: [&str; 2] = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"];
    let name = LISTS.into_iter().find(|name| vars.get(name).is_some()).unwrap_or(LISTS[0]);
    let list = vars.need(name, "the step's nodes, by starting the task with srun")?;
    let host = first_host(list).map_err(|e| invalid(name, list, &format!("not a list of hosts: {e}")))?;
    Ok(Endpoint::Tcp { host, port })
}

/// Derives a port from the job's name: the same port in all processes of the job, but rarely the same for two jobs.
fn derived_port(job: &str) -> u16 {
    let Range { start, end } = DERIVED_PORTS;
    let digest = *blake3::hash(job.as_bytes()).as_bytes();
    start + u16::from_le_bytes([digest[0], digest[1]]) % (end - start)
}

fn run_id(source: LaunchedBy, vars: &Reader) -> String {
    let parts: Vec<&str> = names(source).run_id.iter().map(|name| vars.get(name).unwrap_or("none")).collect();
    parts.join(".")
}
