//! Names of the facts that processes compare at the rendezvous.

/// The mesh.
pub const MESH: &str = "mesh";
/// [`crate::options::Transport`].
pub const TRANSPORT: &str = "transport";
/// [`crate::options::Collectives`].
pub const COLLECTIVES: &str = "collectives";
/// Whether tensors over TCP are encrypted.
pub const ENCRYPTION: &str = "encryption";
/// What determines the bits of results: the CPU's instruction set, or the GPU's libraries.
pub const KERNELS: &str = "kernels";
/// Hash of the plan.
pub const PLAN: &str = "plan";
/// Version of the package.
pub const VERSION: &str = "version";
/// Digest of the program's file.
pub const EXECUTABLE: &str = "executable";
/// World size.
pub const PROCESSES: &str = "number of processes";

/// Maximum length of a value in bytes.
pub const VALUE_BYTES_MAX: usize = 1024;

/// Returns how to fix a difference in the fact `name`.
pub(super) fn advice(name: &str) -> &'static str {
    match name {
        VERSION | EXECUTABLE => "start the same build on every node",
        PROCESSES => "give every launcher the same numbers of nodes and processes",
        MESH => "give every rank the same mesh",
        TRANSPORT => "set the same SHARDFLOW_TRANSPORT on every node",
        COLLECTIVES => "set the same SHARDFLOW_COLLECTIVES on every node",
        ENCRYPTION => "set the same SHARDFLOW_ENCRYPT on every node",
        KERNELS => "use nodes of one kind, with the same environment; otherwise results differ by rounding",
        PLAN => "give every rank the same arguments and configuration",
        _ => "give every rank the same value",
    }
}
