//! Names of the environment variables, and functions that read their values.

use std::collections::BTreeMap;

/// Variable for [`crate::options::Transport`]: `auto`, `shared-memory`, `unix` or `tcp`; the same for all processes.
pub const TRANSPORT: &str = "SHARDFLOW_TRANSPORT";
/// Variable for [`crate::options::Collectives`]: `own` or `mpi`; the same for all processes.
pub const COLLECTIVES: &str = "SHARDFLOW_COLLECTIVES";
/// Variable for the encryption of tensors over TCP: `on` or `off`; the same for all processes.
pub const ENCRYPT: &str = "SHARDFLOW_ENCRYPT";
/// Variable with the exit codes of the attempts after which the launcher restarted the job, separated by commas.
pub const RESTART_CAUSES: &str = "SHARDFLOW_RESTART_CAUSES";
/// Variable with the time at which the launcher started the job: Unix time in milliseconds.
pub const JOB_BEGAN_MS: &str = "SHARDFLOW_JOB_BEGAN_MS";
/// Variable with the local address on which the process listens.
pub const INTERFACE: &str = "SHARDFLOW_INTERFACE";
/// Variable with the host name or address at which other processes reach this one. It changes the host, not the ports.
pub const ADVERTISE: &str = "SHARDFLOW_ADVERTISE";
/// Variable with the milliseconds between heartbeats; the same for all processes.
pub const HEARTBEAT_MS: &str = "SHARDFLOW_HEARTBEAT_MS";
/// Variable with the heartbeat deadline: a process counts as failed after this many milliseconds without a heartbeat.
/// The same for all processes.
pub const HEARTBEAT_DEADLINE_MS: &str = "SHARDFLOW_HEARTBEAT_DEADLINE_MS";
/// Variable with the milliseconds that a process waits at startup until all processes have joined.
pub const MEET_MS: &str = "SHARDFLOW_MEET_MS";
/// Variable with the milliseconds for which a process reports to the others that it failed before the rendezvous.
pub const REPORT_WAIT_MS: &str = "SHARDFLOW_REPORT_WAIT_MS";

/// Environment variables: values by name.
pub type Variables = BTreeMap<String, String>;

/// The environment variables of this process. Invalid UTF-8 becomes replacement characters.
pub fn process_variables() -> Variables {
    let text = |os: std::ffi::OsString| os.to_string_lossy().into_owned();
    std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect()
}

/// A variable's value, if it is set and not empty.
pub(super) fn get<'a>(variables: &'a Variables, name: &str) -> Option<&'a str> {
    variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
}
