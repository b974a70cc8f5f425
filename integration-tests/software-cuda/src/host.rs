//! Accesses of host threads to pinned memory, and the clock tokens that they exchange.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::run::{Running, guest};
use crate::shadow::{Access, Guest, Name};
use crate::world::{World, lock};

/// Accesses memory as the calling host thread, immediately.
pub fn as_host<T>(world: &World, name: &str, act: impl FnOnce(&mut Guest) -> T) -> T {
    let mut state = world.state();
    let agents = state.agents + 1;
    let knows = state.host_clock(world.config.one_host);
    let agent = state.host(world.config.one_host).agent;
    drop(state);
    let mut shadow = lock(&world.shadow);
    let name = Name { what: name.into(), whose: format!("host thread {agent}").into() };
    let operation = shadow.operation(agent, knows.get(agent), name);
    let running = Running { agent, device: 0, operation, clock: knows.padded(agents), knows };
    act(&mut guest(&mut shadow, &world.registry, &world.findings, &running))
}

/// Records that the calling thread reads or writes pinned memory.
pub fn touch(world: &World, address: usize, bytes: usize, is_write: bool) {
    let (name, access) = if is_write { ("host write", Access::Write) } else { ("host read", Access::Read) };
    as_host(world, name, |guest| guest.touch(address, bytes, access));
}

/// Captures the calling thread's clock as a token for a message; never 0.
pub fn capture(world: &World) -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let token = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut state = world.state();
    let clock = state.host_clock(world.config.one_host);
    state.tokens.insert(token, clock);
    token
}

/// Joins the token of a received message; several threads may join it.
pub fn join(world: &World, token: u64) {
    let mut state = world.state();
    if let Some(clock) = state.tokens.get(&token).cloned() {
        state.host(world.config.one_host).clock.join(&clock);
    }
}

/// Drops a token.
pub fn forget(world: &World, token: u64) {
    world.state().tokens.remove(&token);
}
