//! Tests collectives of one to four devices: bit-exact results, byte counts, members whose calls differ, and aborts.

use std::sync::Arc;
use std::thread;

use super::harness::{self, Notifications, Numbers, Report, TIMEOUT, flat, launch, run_program, wait};
use crate::clock::Stamped;
use crate::collective::{CollectiveCall, CollectiveKind, Group, ReduceOp};
use crate::device::Device;
use crate::error::{KernelError, Result};
use crate::memory::Arena;
use crate::op::{Buffer, Launch, Op, Program};
use crate::stream::Stream;
use crate::tensor::regions::{Regions, SplitAxis};
use crate::tensor::{DType, HostTensor, Region, element_count, split_range};

/// One device with a stream and an arena. The arena contains x (at offset 0), y and a workspace.
struct Member {
    device: Device,
    stream: Stream,
    arena: Arena,
}

pub(super) const ARENA_BYTES: usize = 1 << 20;

/// Of n devices with ranks `0..n`, creates those that belong to this process, in rank order. Each device has a new
/// engine and an arena of [`COLLECTIVES_ARENA_BYTES`](super::COLLECTIVES_ARENA_BYTES).
pub type Make<'a> = dyn Fn(usize) -> Result<Vec<(Device, Arena)>> + 'a;

/// The order in which an engine sums the members' values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SummationOrder {
    /// The order that [`Group`] defines. Sums are bit-exact.
    InOrder,
    /// Any order. Sums are correct up to rounding.
    InAnyOrder,
}

/// Number of groups (ids from 1) that one set of devices calls in turn. NCCL needs almost a second for each group.
pub(super) const GROUPS: u32 = 4;

/// A shape that is too large for the special code that some engines have for small tensors.
const LARGE: [usize; 2] = [101, 203];

/// Offset of y in bytes. In the arena, y follows x.
const Y: usize = 1 << 17;

/// Offset of the workspace in bytes, if the device needs a workspace.
const WORKSPACE: usize = 1 << 18;

/// The input and the expected result of one member.
struct Role {
    x: HostTensor,
    y_shape: Vec<usize>,
    in_place: bool,
    expected: Vec<f32>,
    received_elements: usize,
}

impl Role {
    fn new(x: HostTensor, y_shape: &[usize], expected: Vec<f32>, received_elements: usize) -> Self {
        Self { x, y_shape: y_shape.to_vec(), in_place: false, expected, received_elements }
    }
}

pub(super) struct EngineRequirements {
    pub(super) members_max: usize,
    pub(super) sums: SummationOrder,
    /// True if no other process has members. Otherwise aborts are not tested, since nothing can run after an abort.
    pub(super) single_process: bool,
    /// True if the engine reports members that make different calls.
    pub(super) compares_calls: bool,
    /// True if the members may call the groups in different orders, on separate streams.
    pub(super) any_order: bool,
}

impl EngineRequirements {
    pub(super) fn of(members_max: usize, sums: SummationOrder) -> Self {
        Self { members_max, sums, single_process: true, compares_calls: true, any_order: true }
    }
}

pub(super) fn run(report: &mut Report, make: &Make<'_>, requirements: &EngineRequirements) {
    let EngineRequirements { members_max, sums, single_process, compares_calls, any_order } = *requirements;
    for n in 1..=members_max {
        let members = match members(make, n) {
            Ok(members) => members,
            Err(error) => return report.fail("collectives", error),
        };
        let mut suite = Suite { report, n, members: &members, numbers: Numbers::new(n as u64, false), group: 0, sums };
        suite.all_reduces();
        suite.moves();
        suite.reduce_scatters();
        if n >= 2
            && let Err(error) = suite.chain()
        {
            suite.report.fail(&format!("send and receive along {n} members"), error);
        }
        suite.broadcasts();
    }
    if members_max >= 3
        && let Err(error) = concurrent(report, make, any_order)
    {
        report.fail("groups in flight at the same time", error);
    }
    if members_max >= 3 && compares_calls {
        disagreements(report, make);
    }
    if members_max >= 2 && single_process {
        aborts(report, make);
    }
}

fn members(make: &Make<'_>, n: usize) -> Result<Vec<Member>> {
    let member = |(device, arena): (Device, _)| Ok(Member { stream: device.stream("collective", 1)?, arena, device });
    make(n)?.into_iter().map(member).collect()
}

impl Member {
    fn submit(&self, launches: Vec<Launch>, signals: Vec<(usize, u32)>) -> Result<Notifications> {
        submit(&self.stream, launches, signals, &self.arena)
    }

    /// The launch of a call with x at 0 and y at [`Y`]. A send has no y, and a receive has no x.
    fn launch(&self, group: &Arc<Group>, kind: &CollectiveKind, x: &[usize], y: &[usize]) -> Launch {
        let reads = (!matches!(kind, CollectiveKind::Receive { .. })).then(|| buffer(0, x, DType::F32));
        let writes = (!matches!(kind, CollectiveKind::Send { .. })).then(|| buffer(Y, y, DType::F32));
        let call = CollectiveCall { group: group.clone(), member: self.device.rank(), kind: kind.clone() };
        let (reads, writes) = (reads.into_iter().collect(), writes.into_iter().collect());
        with_workspace(&self.device, WORKSPACE, launch(Op::Collective(call), reads, writes))
    }
}

fn buffer(offset: usize, shape: &[usize], dtype: DType) -> Buffer {
    Buffer { base: 0, offset, shape: shape.to_vec(), dtype }
}

/// Like [`harness::submit`], on a new thread: one thread must not submit for two members that may wait for each other.
fn submit(stream: &Stream, launches: Vec<Launch>, signals: Vec<(usize, u32)>, arena: &Arena) -> Result<Notifications> {
    let program = Stamped::new(Program { name: "collectives".to_owned(), launches, signals });
    let submit = || harness::submit(stream, program.open(), &[arena], false);
    let submitted = thread::scope(|scope| scope.spawn(submit).join());
    submitted.unwrap_or_else(|_| Err(KernelError::Aborted { cause: "submit panicked".to_owned() }))
}

fn with_workspace(device: &Device, offset: usize, mut launch: Launch) -> Launch {
    let floats = device.kind().workspace_bytes(&launch).div_ceil(4);
    launch.workspace = (floats > 0).then(|| buffer(offset, &[floats], DType::F32));
    launch
}

struct Suite<'a> {
    report: &'a mut Report,
    n: usize,
    members: &'a [Member],
    numbers: Numbers,
    group: u32,
    sums: SummationOrder,
}

/// Returns even, uneven and empty splits of a dim.
fn splits(shape: &[usize], n: usize) -> Vec<Vec<Region>> {
    let mut all = Vec::new();
    for dim in 0..shape.len() {
        let part = |i| Region::whole(shape).with_range(dim, split_range(shape[dim], n, i));
        all.push((0..n).map(part).collect());
    }
    // In this split, the last member has everything.
    let mut parts = vec![Region { start: vec![0; shape.len()], size: vec![0; shape.len()] }; n];
    parts[n - 1] = Region::whole(shape);
    all.push(parts);
    all
}

/// Returns the regions as a split of the shape along one dim if possible, else as a list. So engines run both forms.
fn form(shape: &[usize], regions: &[Region]) -> Regions {
    let split = |dim| Regions::split(shape, [SplitAxis { count: regions.len(), dim: Some(dim) }]);
    let found = (0..shape.len()).map(split).find(|split| *split.list() == *regions);
    found.unwrap_or_else(|| regions.to_vec().into())
}

fn cut(whole: &[f32], shape: &[usize], region: &Region) -> Vec<f32> {
    (0..region.element_count()).map(|index| whole[flat(index, region, shape)]).collect()
}

/// Combines the members' values in f32. Every engine must keep this order: for each prime factor of the number of
/// members, in ascending order, as many consecutive values become one.
fn combine(op: ReduceOp, members: &[Vec<f32>]) -> Vec<f32> {
    let combine_two = |a: Vec<f32>, b: &Vec<f32>| match op {
        ReduceOp::Sum => a.iter().zip(b).map(|(a, b)| a + b).collect(),
        ReduceOp::Max => a.iter().zip(b).map(|(a, b)| a.max(*b)).collect(),
    };
    let mut values = members.to_vec();
    while values.len() > 1 {
        let factor = (2..).find(|factor| values.len().is_multiple_of(*factor)).unwrap_or(1);
        values = values.chunks(factor).map(|group| group[1..].iter().fold(group[0].clone(), combine_two)).collect();
    }
    values.concat()
}

impl Suite<'_> {
    fn values(&mut self, elements: usize) -> Vec<f32> {
        self.numbers.tensor(&[elements], 1.0).as_f32().unwrap_or_default().to_vec()
    }

    /// Maximum difference between sums in two orders. Each sum is rounded n - 1 times. Since the values are at most 1,
    /// one rounding changes the sum by at most `n * EPSILON / 2`.
    fn tolerance(&self, kind: &CollectiveKind) -> f32 {
        match kind {
            CollectiveKind::AllReduce { op: ReduceOp::Sum }
            | CollectiveKind::ReduceScatter { op: ReduceOp::Sum, .. }
                if self.sums == SummationOrder::InAnyOrder =>
            {
                ((self.n - 1) * self.n) as f32 * f32::EPSILON
            }
            _ => 0.0,
        }
    }

    fn next_group(&mut self) -> Arc<Group> {
        self.group = self.group % GROUPS + 1;
        Arc::new(Group { id: self.group, ranks: (0..self.n).collect() })
    }

    /// Runs one collective twice on all members, and compares bits and byte counts.
    fn check(&mut self, kind: CollectiveKind, roles: impl Iterator<Item = Role>) {
        let roles: Vec<Role> = roles.collect();
        let group = self.next_group();
        let check = format!("{kind:?} of {} members", self.n);
        for _ in 0..2 {
            if let Err(error) = self.exchange(&check, &group, &kind, &roles) {
                self.report.fail(&check, error);
            }
        }
    }

    fn exchange(&mut self, check: &str, group: &Arc<Group>, kind: &CollectiveKind, roles: &[Role]) -> Result<()> {
        let received = |member: &Member| member.device.engine().bytes_received(member.device.rank());
        let before: Vec<u64> = self.members.iter().map(received).collect();
        let mut ends = Vec::new();
        for member in self.members {
            let role = &roles[member.device.rank()];
            member.arena.write_host(0, &role.x)?;
            let poison = vec![f32::NAN; element_count(&role.y_shape) + 1];
            member.arena.write_host(Y, &HostTensor::f32(&[poison.len()], poison))?;
            let mut launch = member.launch(group, kind, &role.x.shape, &role.y_shape);
            launch.writes[0].offset = if role.in_place { 0 } else { Y };
            ends.push((member, role, member.submit(vec![launch], vec![])?));
        }
        let tolerance = self.tolerance(kind);
        for (b, (member, role, end)) in ends.into_iter().enumerate() {
            wait(&end)?;
            let offset = if role.in_place { 0 } else { Y };
            let got = member.arena.read_host(offset, &role.y_shape, DType::F32)?;
            let equal = |(got, expected): (&f32, &f32)| {
                got.to_bits() == expected.to_bits() || (got - expected).abs() <= tolerance && tolerance > 0.0
            };
            let got_values = got.as_f32().unwrap_or_default();
            let same = got_values.len() == role.expected.len() && got_values.iter().zip(&role.expected).all(equal);
            let (i, bytes_before) = (member.device.rank(), before[b]);
            let check = format!("{check}, member {i}, x {:?}, in place {}", role.x.shape, role.in_place);
            if !same {
                self.report.fail(&check, format!("expected {:?}, got {:?}", role.expected, got.as_f32()));
            }
            let after = member.arena.read_host(Y + 4 * element_count(&role.y_shape), &[1], DType::F32)?;
            let untouched = after.as_f32().is_some_and(|after| after[0].is_nan());
            self.report.expect(&check, untouched, "the collective wrote past the end of y");
            let (bytes, expected) = (received(member) - bytes_before, 4 * role.received_elements as u64);
            self.report.expect(&check, bytes == expected, format!("expected {expected} received bytes, got {bytes}"));
        }
        Ok(())
    }

    fn all_reduces(&mut self) {
        use ReduceOp::{Max, Sum};
        let n = self.n;
        for (elements, op) in [(0, Sum), (1, Sum), (3, Max), (17, Sum), (5003, Sum), (5003, Max)] {
            for in_place in [false, true] {
                let xs: Vec<_> = (0..n).map(|_| self.values(elements)).collect();
                let sum = combine(op, &xs);
                let role = |(i, x): (usize, &Vec<f32>)| {
                    let own = split_range(elements, n, i).len();
                    let (x, received) = (HostTensor::f32(&[elements], x.clone()), (n - 1) * own + elements - own);
                    Role { in_place, ..Role::new(x, &[elements], sum.clone(), received) }
                };
                self.check(CollectiveKind::AllReduce { op }, xs.iter().enumerate().map(role));
            }
        }
    }

    /// Tests all-gather and all-to-all for every pair of splits.
    fn moves(&mut self) {
        let n = self.n;
        for shape in [vec![5, 7], vec![4, 3, 2], vec![1], vec![0, 3], LARGE.to_vec()] {
            let whole = self.values(element_count(&shape));
            let x = |region: &Region| HostTensor::f32(&region.size, cut(&whole, &shape, region));
            for parts in splits(&shape, n) {
                let role = |part| Role::new(x(part), &shape, whole.clone(), whole.len() - part.element_count());
                self.check(CollectiveKind::AllGather { parts: form(&shape, &parts) }, parts.iter().map(role));
            }
            // In the last case, every member already has the whole tensor, so nothing is transferred.
            for sources in splits(&shape, n).into_iter().chain([vec![Region::whole(&shape); n]]) {
                for targets in splits(&shape, n) {
                    let role = |(source, target): (&Region, &Region)| {
                        let own = source.intersect(target).map_or(0, |common| common.element_count());
                        let expected = cut(&whole, &shape, target);
                        Role::new(x(source), &target.size, expected, target.element_count() - own)
                    };
                    let kind =
                        CollectiveKind::AllToAll { sources: form(&shape, &sources), targets: form(&shape, &targets) };
                    self.check(kind, sources.iter().zip(&targets).map(role));
                }
            }
        }
    }

    fn reduce_scatters(&mut self) {
        let n = self.n;
        for shape in [vec![5, 7], vec![4, 3, 2], vec![0, 3], LARGE.to_vec()] {
            for parts in splits(&shape, n) {
                let xs: Vec<_> = (0..n).map(|_| self.values(element_count(&shape))).collect();
                let sum = combine(ReduceOp::Sum, &xs);
                let role = |(owner, part): (usize, &Region)| {
                    let x = HostTensor::f32(&shape, xs[owner].clone());
                    Role::new(x, &part.size, cut(&sum, &shape, part), (n - 1) * part.element_count())
                };
                let kind = CollectiveKind::ReduceScatter { op: ReduceOp::Sum, parts: form(&shape, &parts) };
                self.check(kind, parts.iter().enumerate().map(role));
            }
        }
    }

    fn broadcasts(&mut self) {
        let n = self.n;
        for root in 0..n {
            for in_place in [false, true] {
                let xs: Vec<_> = (0..n).map(|_| self.values(33)).collect();
                let role = |(i, x): (usize, &Vec<f32>)| {
                    let (x, received) = (HostTensor::f32(&[3, 11], x.clone()), if i == root { 0 } else { 33 });
                    Role { in_place, ..Role::new(x, &[3, 11], xs[root].clone(), received) }
                };
                self.check(CollectiveKind::Broadcast { root }, xs.iter().enumerate().map(role));
            }
        }
    }

    /// Checks that two messages through a chain of members arrive in the order in which they were sent.
    fn chain(&mut self) -> Result<()> {
        let n = self.n;
        let group = self.next_group();
        let call = |member, kind| CollectiveCall { group: group.clone(), member, kind };
        let x = HostTensor::i32(&[2], vec![41, 42]);
        let mut ends = Vec::new();
        for member in self.members {
            let i = member.device.rank();
            if i == 0 {
                member.arena.write_host(0, &x)?;
            }
            let mut launches = Vec::new();
            for x in [0, 4].map(|offset| vec![buffer(offset, &[1], DType::I32)]) {
                let mut push =
                    |kind, reads, writes| launches.push(launch(Op::Collective(call(i, kind)), reads, writes));
                if i > 0 {
                    push(CollectiveKind::Receive { from: i - 1 }, vec![], x.clone());
                }
                if i + 1 < n {
                    push(CollectiveKind::Send { to: i + 1 }, x, vec![]);
                }
            }
            ends.push(member.submit(launches, vec![])?);
        }
        ends.iter().try_for_each(wait)?;
        if let Some(last) = self.members.iter().find(|member| member.device.rank() == n - 1) {
            let got = last.arena.read_host(0, &[2], DType::I32)?;
            self.report.expect("send and receive", got == x, format!("expected {x:?}, got {got:?}"));
        }
        Ok(())
    }
}

/// Runs many rounds of two groups on separate streams of the same devices, in opposite orders if `any_order` is set.
fn concurrent(report: &mut Report, make: &Make<'_>, any_order: bool) -> Result<()> {
    const ROUNDS: usize = 200;
    let [n, elements] = [3, 100];
    let devices = make(n)?;
    let mut ends = Vec::new();
    let mut streams = Vec::new();
    for (device, arena) in &devices {
        let i = device.rank();
        for group in if i % 2 == 0 || !any_order { [1, 2] } else { [2, 1] } {
            let (stream, offset) = (device.stream("collective", 1)?, (group as usize - 1) * Y);
            arena.write_host(offset, &HostTensor::f32(&[elements], vec![(i + 1) as f32; elements]))?;
            let group = Arc::new(Group { id: group, ranks: (0..n).collect() });
            let kind = CollectiveKind::AllReduce { op: ReduceOp::Sum };
            let x = buffer(offset, &[elements], DType::F32);
            let op = Op::Collective(CollectiveCall { group, member: i, kind });
            let reduce = with_workspace(device, WORKSPACE + offset, launch(op, vec![x.clone()], vec![x.clone()]));
            // Each round multiplies the values by n. Scaling by 1/n afterwards keeps them constant.
            let op = Op::Scale { factor: 1.0 / n as f32 };
            let scale = Launch { op, writes: vec![x], workspace: None, ..reduce.clone() };
            let launches = (0..ROUNDS).flat_map(|_| [reduce.clone(), scale.clone()]).collect();
            ends.push((submit(&stream, launches, vec![], arena)?, arena, offset));
            streams.push(stream);
        }
    }
    for (end, arena, offset) in &ends {
        wait(end)?;
        let got = arena.read_host(*offset, &[elements], DType::F32)?;
        report.close("groups in flight at the same time", &got, &vec![2.0; elements], 1e-4);
    }
    Ok(())
}

/// Checks that all members receive an error if members make different calls.
fn disagreements(report: &mut Report, make: &Make<'_>) {
    let sum = || CollectiveKind::AllReduce { op: ReduceOp::Sum };
    let max = || CollectiveKind::AllReduce { op: ReduceOp::Max };
    let gather = || CollectiveKind::AllGather { parts: splits(&[6], 3).swap_remove(0).into() };
    let cases = [
        ("a different op", 0, max(), [6, 6]),
        ("a different shape", 0, sum(), [5, 5]),
        ("a different kind", 0, gather(), [2, 6]),
        ("buffers that do not fit", 0, sum(), [6, 5]),
        // One member sends to member 0, or receives from it, instead of joining the all-reduce.
        ("a send", 1, CollectiveKind::Send { to: 0 }, [6, 0]),
        ("a receive", 1, CollectiveKind::Receive { from: 0 }, [0, 6]),
    ];
    for (what, first, different_kind, different_shape) in cases {
        // All members must receive the error, no matter which member arrives first.
        for odd_member in first..3 {
            let check = format!("member {odd_member} of 3 with {what}");
            let result = members(make, 3).and_then(|members| {
                let group = Arc::new(Group { id: 1, ranks: vec![0, 1, 2].into() });
                let mut ends = Vec::new();
                for member in &members {
                    let is_odd = member.device.rank() == odd_member;
                    let (kind, [x, y]) = if is_odd { (&different_kind, different_shape) } else { (&sum(), [6, 6]) };
                    ends.push(member.submit(vec![member.launch(&group, kind, &[x], &[y])], vec![])?);
                }
                Ok(ends.iter().map(wait).collect::<Vec<_>>())
            });
            let is_mismatch = |result: &Result<()>| {
                matches!(result, Err(KernelError::CollectiveMismatch { .. } | KernelError::Arguments { .. }))
            };
            let all_report = result.as_ref().is_ok_and(|results| results.iter().all(is_mismatch));
            report.expect(&check, all_report, format!("got {result:?}"));
        }
    }
}

/// Checks that an abort wakes all waiting calls and rejects later calls.
fn aborts(report: &mut Report, make: &Make<'_>) {
    let kinds = [
        CollectiveKind::AllReduce { op: ReduceOp::Sum },
        CollectiveKind::Send { to: 1 },
        CollectiveKind::Receive { from: 1 },
    ];
    for kind in kinds {
        let check = format!("abort of {kind:?}");
        if let Err(error) = abort(report, &check, make, kind) {
            report.fail(&check, error);
        }
    }
}

fn abort(report: &mut Report, check: &str, make: &Make<'_>, kind: CollectiveKind) -> Result<()> {
    let members = members(make, 2)?;
    let group = Arc::new(Group { id: 1, ranks: vec![0, 1].into() });
    let launch = members[0].launch(&group, &kind, &[2], &[2]);
    let waiting = members[0].submit(vec![launch.clone()], vec![(0, 1)])?;
    // This signal is sent when the stream reaches the collective.
    let started = waiting.recv_timeout(TIMEOUT).is_ok();
    members[1].device.engine().abort("aborted by the test");
    members[1].device.engine().abort("a later cause");
    let expected = Err(KernelError::Aborted { cause: "aborted by the test".to_owned() });
    let first = wait(&waiting);
    let later = run_program(&members[0].stream, vec![launch], &[&members[0].arena], false);
    let what = format!("the waiting call returned {first:?}; a later call returned {later:?}");
    report.expect(check, started && first == expected && later == expected, what);
    Ok(())
}
