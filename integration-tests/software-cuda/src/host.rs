//! Accesses of host threads to pinned memory, and the clock tokens that they exchange.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::run::{Running, accessor};
use crate::shadow::{Access, Accessor, OperationName};
use crate::world::{SoftwareMachine, lock};

/// Accesses memory immediately, as an action of the calling host thread.
pub fn access_as_host<T>(machine: &SoftwareMachine, name: &str, act: impl FnOnce(&mut Accessor) -> T) -> T {
    let mut state = machine.state();
    let agents = state.agents + 1;
    let knows = state.host_clock(machine.config.one_host);
    let agent = state.host(machine.config.one_host).agent;
    drop(state);
    let mut shadow = lock(&machine.shadow);
    let name = OperationName { action: name.into(), agent: format!("host thread {agent}").into() };
    let operation = shadow.operation(agent, knows.get(agent), name);
    let running = Running { agent, device: 0, operation, clock: knows.padded(agents), knows };
    act(&mut accessor(&mut shadow, &machine.registry, &machine.findings, &running))
}

/// Records that the calling thread reads or writes pinned memory.
pub fn touch(machine: &SoftwareMachine, address: usize, bytes: usize, is_write: bool) {
    let (name, access) = if is_write { ("host write", Access::Write) } else { ("host read", Access::Read) };
    access_as_host(machine, name, |accessor| accessor.touch(address, bytes, access));
}

/// Returns the calling thread's clock as a token for a message. A token is never 0.
pub fn capture(machine: &SoftwareMachine) -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let token = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut state = machine.state();
    let clock = state.host_clock(machine.config.one_host);
    state.tokens.insert(token, clock);
    token
}

/// Joins a received token into the calling thread's clock. Several threads may join the same token.
pub fn join(machine: &SoftwareMachine, token: u64) {
    let mut state = machine.state();
    if let Some(clock) = state.tokens.get(&token).cloned() {
        state.host(machine.config.one_host).clock.join(&clock);
    }
}

/// Drops a token that no thread will join any more.
pub fn forget(machine: &SoftwareMachine, token: u64) {
    machine.state().tokens.remove(&token);
}
