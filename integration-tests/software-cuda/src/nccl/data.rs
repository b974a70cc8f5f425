//! Memory accesses and arithmetic for collectives and messages.
//!
//! Reductions add in rank order, so results do not depend on the schedule. For floating-point types of up to 32 bits,
//! reductions use f32.
#![allow(unsafe_code)]

use crate::nccl::engine::{Call, CallKind};
use crate::run::{Running, accessor};
use crate::shadow::Access;
use crate::world::{SoftwareMachine, lock};

/// Bytes of an element. NCCL's number of the element type is the index.
const ELEMENT_BYTES: [usize; 12] = [1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1];
const AVERAGE: u32 = 4;

/// A rank that takes part in a collective or message.
pub(crate) struct Member {
    /// The rank's call.
    pub call: Call,
    /// The number of the rank.
    pub rank: usize,
    /// The rank's running operation.
    pub running: Running,
}

/// Returns the bytes of an element, or `None` for an unknown type.
pub fn element_bytes(dtype: u32) -> Option<usize> {
    ELEMENT_BYTES.get(dtype as usize).copied()
}

/// Returns the indices of the members whose data other members receive.
pub fn sources(members: &[Member]) -> Vec<usize> {
    match members[0].call.kind {
        CallKind::Send | CallKind::Receive => vec![0],
        CallKind::Broadcast => {
            (0..members.len()).filter(|m| members[*m].rank == members[*m].call.peer as usize).collect()
        }
        _ => (0..members.len()).collect(),
    }
}

/// Returns how many elements a member sends and how many it receives.
fn lengths(call: &Call, rank: usize, ranks: usize) -> (usize, usize) {
    let (n, is_root) = (call.count, call.peer as usize == rank);
    match call.kind {
        CallKind::AllReduce => (n, n),
        CallKind::Broadcast => (if is_root { n } else { 0 }, n),
        CallKind::Reduce => (n, if is_root { n } else { 0 }),
        CallKind::AllGather => (n, n * ranks),
        CallKind::ReduceScatter => (n * ranks, n),
        CallKind::Send => (n, 0),
        CallKind::Receive => (0, n),
    }
}

/// Describes a mismatch between the ranks' calls, or returns `None` if they match.
pub fn mismatch(calls: &[(usize, Call)]) -> Option<String> {
    let first = &calls[0];
    let is_message = matches!(first.1.kind, CallKind::Send | CallKind::Receive);
    let facts = |call: &Call| {
        let (kind, reduction, root) =
            if is_message { (None, 0, 0) } else { (Some(call.kind), call.reduction, call.peer) };
        (kind, call.count, call.dtype, reduction, root)
    };
    let other = calls.iter().find(|c| facts(&c.1) != facts(&first.1))?;
    let describe = |(rank, c): &(usize, Call)| {
        format!(
            "rank {rank} calls {:?} of {} elements of type {}, reduction {}, root or peer {}",
            c.kind, c.count, c.dtype, c.reduction, c.peer
        )
    };
    Some(format!("{}, but {}", describe(first), describe(other)))
}

/// Checks and executes one collective or message. `members` are all ranks in order, or the sender and the receiver.
/// Returns true if the calls do not match.
pub fn execute(machine: &SoftwareMachine, members: &[Member]) -> bool {
    let calls: Vec<(usize, Call)> = members.iter().map(|m| (m.rank, m.call)).collect();
    if let Some(message) = mismatch(&calls) {
        machine.report_finding("collective-mismatch", &message, || message.clone());
        return true;
    }
    let inputs: Option<Vec<Vec<u8>>> = members.iter().map(|m| read_input(machine, m, members.len())).collect();
    let Some(inputs) = inputs else { return false };
    let whole = combine(&calls[0].1, &inputs.iter().map(|input| &input[..]).collect::<Vec<_>>());
    members.iter().for_each(|member| write_output(machine, member, members.len(), &whole));
    false
}

/// Reads the data that a member sends. Returns `None` if the access is invalid.
pub fn read_input(machine: &SoftwareMachine, member: &Member, ranks: usize) -> Option<Vec<u8>> {
    let bytes = sent_bytes(member, ranks);
    let mut shadow = lock(&machine.shadow);
    let mut accessor = accessor(&mut shadow, &machine.registry, &machine.findings, &member.running);
    if !accessor.touch(member.call.send, bytes, Access::Read) {
        return None;
    }
    let mut input = Vec::new();
    if bytes > 0 {
        // SAFETY: the range was checked above.
        input.extend_from_slice(unsafe { std::slice::from_raw_parts(member.call.send as *const u8, bytes) });
    }
    Some(input)
}

/// Returns the number of bytes that a member sends.
pub fn sent_bytes(member: &Member, ranks: usize) -> usize {
    lengths(&member.call, member.rank, ranks).0 * ELEMENT_BYTES[member.call.dtype as usize]
}

/// Combines the data of all members. Each member receives the whole result or its own part; see [`write_output`].
pub fn combine(call: &Call, inputs: &[&[u8]]) -> Vec<u8> {
    match call.kind {
        CallKind::AllReduce | CallKind::Reduce | CallKind::ReduceScatter => reduce(inputs, call),
        CallKind::AllGather => inputs.concat(),
        CallKind::Broadcast => inputs[call.peer as usize].to_vec(),
        CallKind::Send | CallKind::Receive => inputs[0].to_vec(),
    }
}

/// Writes the data that a member receives.
pub fn write_output(machine: &SoftwareMachine, member: &Member, ranks: usize, whole: &[u8]) {
    let (_, received) = lengths(&member.call, member.rank, ranks);
    let bytes = received * ELEMENT_BYTES[member.call.dtype as usize];
    let mut shadow = lock(&machine.shadow);
    let mut accessor = accessor(&mut shadow, &machine.registry, &machine.findings, &member.running);
    if bytes == 0 || !accessor.touch(member.call.receive, bytes, Access::Write) {
        return;
    }
    let start = if member.call.kind == CallKind::ReduceScatter { member.rank * bytes } else { 0 };
    // SAFETY: the range was checked above, and `whole` is long enough.
    unsafe {
        let from = whole[start..start + bytes].as_ptr();
        std::ptr::copy_nonoverlapping(from, member.call.receive as *mut u8, bytes);
    }
}

fn reduce(inputs: &[&[u8]], call: &Call) -> Vec<u8> {
    let (dtype, ranks) = (call.dtype, inputs.len());
    let bytes = ELEMENT_BYTES[dtype as usize];
    let mut out = vec![0; inputs[0].len()];
    for at in (0..out.len()).step_by(bytes) {
        let items = inputs.iter().map(|input| &input[at..at + bytes]);
        let to = &mut out[at..at + bytes];
        match dtype {
            7 | 9 => {
                let values = items.map(|i| load_f32(i, dtype));
                let sum = fold(values, call.reduction, |a, b| a + b, |a, b| a * b, f32::max, f32::min);
                let value = if call.reduction == AVERAGE { sum / ranks as f32 } else { sum };
                store_f32(to, dtype, value);
            }
            8 => {
                let values = items.map(|i| f64::from_ne_bytes(i.try_into().expect("eight bytes")));
                let sum = fold(values, call.reduction, |a, b| a + b, |a, b| a * b, f64::max, f64::min);
                let value = if call.reduction == AVERAGE { sum / ranks as f64 } else { sum };
                to.copy_from_slice(&value.to_ne_bytes());
            }
            _ => {
                let values = items.map(|i| load_i64(i, dtype));
                let wrap = (i64::wrapping_add, i64::wrapping_mul);
                let sum = fold(values, call.reduction, wrap.0, wrap.1, i64::max, i64::min);
                let value = if call.reduction == AVERAGE { sum / ranks as i64 } else { sum };
                to.copy_from_slice(&value.to_le_bytes()[..bytes]);
            }
        }
    }
    out
}

fn fold<T: Copy>(
    mut values: impl Iterator<Item = T>,
    reduction: u32,
    sum: impl Fn(T, T) -> T,
    product: impl Fn(T, T) -> T,
    max: impl Fn(T, T) -> T,
    min: impl Fn(T, T) -> T,
) -> T {
    let first = values.next().expect("at least one rank");
    values.fold(first, |a, b| match reduction {
        1 => product(a, b),
        2 => max(a, b),
        3 => min(a, b),
        _ => sum(a, b),
    })
}

fn load_f32(bytes: &[u8], dtype: u32) -> f32 {
    if dtype == 9 {
        return f32::from_bits(u32::from(u16::from_le_bytes(bytes.try_into().expect("two bytes"))) << 16);
    }
    f32::from_ne_bytes(bytes.try_into().expect("four bytes"))
}

fn store_f32(to: &mut [u8], dtype: u32, value: f32) {
    if dtype == 9 {
        to.copy_from_slice(&to_bf16(value).to_le_bytes());
    } else {
        to.copy_from_slice(&value.to_ne_bytes());
    }
}

/// Rounds to the nearest bf16, ties to even.
pub fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return 0x7fff;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

fn load_i64(bytes: &[u8], dtype: u32) -> i64 {
    let mut wide = [0; 8];
    let is_signed = matches!(dtype, 0 | 2 | 4);
    if is_signed && bytes.last().is_some_and(|b| b & 0x80 != 0) {
        wide = [0xff; 8];
    }
    wide[..bytes.len()].copy_from_slice(bytes);
    i64::from_le_bytes(wide)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(kind: CallKind, dtype: u32, reduction: u32) -> Call {
        Call { kind, send: 0, receive: 0, count: 2, dtype, reduction, peer: 0 }
    }

    #[test]
    fn every_type_is_reduced() {
        let f32_bytes = |v: [f32; 2]| v.iter().flat_map(|x| x.to_ne_bytes()).collect::<Vec<u8>>();
        let inputs = [&f32_bytes([1.0, -2.0])[..], &f32_bytes([3.0, 4.0])];
        assert_eq!(reduce(&inputs, &call(CallKind::AllReduce, 7, 0)), f32_bytes([4.0, 2.0]));
        assert_eq!(reduce(&inputs, &call(CallKind::AllReduce, 7, AVERAGE)), f32_bytes([2.0, 1.0]));
        assert_eq!(reduce(&inputs, &call(CallKind::AllReduce, 7, 2)), f32_bytes([3.0, 4.0]));
        let bytes = [&[255u8, 3][..], &[1, 4]];
        assert_eq!(reduce(&bytes, &call(CallKind::AllReduce, 0, 0)), [0, 7]);
        assert_eq!(reduce(&bytes, &call(CallKind::AllReduce, 1, 2)), [255, 4]);
        let bf16_bytes = |v: [f32; 2]| v.iter().flat_map(|x| to_bf16(*x).to_le_bytes()).collect::<Vec<u8>>();
        assert_eq!(
            reduce(&[&bf16_bytes([1.0, 2.0])[..], &bf16_bytes([0.5, 0.25])], &call(CallKind::AllReduce, 9, 0)),
            bf16_bytes([1.5, 2.25])
        );
    }
}
