//! Memory is static and planned. After the start, nothing is allocated on a device. The measured peak is at most the
//! planned peak and close to it. A plan that does not fit is refused before anything runs.

use shardflow::passes::precision::Precision;
use shardflow::passes::{CompileError, CompileOptions, THREADS_MAX, compile};
use shardflow::plan::Schedule::{GPipe, OneFOneB};
use shardflow::plan::error::PlanError;
use shardflow::session::{Session, SessionOptions, Threads};
use shardflow_integration_tests::training::{Model, ONE, options, within};

const MESHES: &[&str] = &[ONE, "data=2", "tensor=2", "stage=2", "stage=4", "data=2,stage=2,tensor=2", "data=3"];

fn model() -> Model {
    Model { batch: 24, max_norm: 1.0, ..Model::default() }
}

#[test]
fn a_running_session_allocates_nothing_on_devices() {
    within(120, || {
        for mesh in MESHES {
            let mut session = model().session(mesh, &options(4, OneFOneB));
            let allocated = |session: &shardflow::session::Session| -> Vec<(usize, usize)> {
                session.metrics().devices.iter().map(|d| (d.allocations, d.allocated_bytes)).collect()
            };
            let before = allocated(&session);
            assert!(before.iter().all(|d| d.0 > 0 && d.1 > 0), "mesh {mesh}: {before:?}");
            (0..10).for_each(|_| drop(model().step(&mut session)));
            assert_eq!(allocated(&session), before, "mesh {mesh}");
        }
    });
}

#[test]
fn the_measured_peak_is_within_a_tenth_of_the_planned_one() {
    within(180, || {
        for mesh in MESHES {
            for (schedule, micro_batches) in [(GPipe, 1), (GPipe, 8), (OneFOneB, 1), (OneFOneB, 8)] {
                let mut session = model().session(mesh, &options(micro_batches, schedule));
                (0..5).for_each(|_| drop(model().step(&mut session)));
                let metrics = session.metrics();
                for device in &metrics.devices {
                    let (measured, planned) = (device.measured_peak_bytes, device.planned_peak_bytes);
                    let idle: Vec<String> = metrics
                        .registers
                        .iter()
                        .filter(|r| r.slots_peak < r.slots && r.name.starts_with(&format!("device {} ", device.device)))
                        .map(|r| format!("{}: {} of {} slots of {} bytes", r.name, r.slots_peak, r.slots, r.slot_bytes))
                        .collect();
                    let case =
                        format!("mesh {mesh}, {schedule:?}, {micro_batches} micro-batches, {device:?}, idle {idle:#?}");
                    assert!(measured <= planned && measured * 10 >= planned * 9, "{case}");
                }
            }
        }
    });
}

/// The plan includes the memory that a stream needs for each thread, and for converting bf16 to f32. Nothing else in
/// the plan depends on the number of threads.
#[test]
fn all_allocated_memory_is_planned_for_any_number_of_threads() {
    within(120, || {
        for precision in [Precision::F32, Precision::BF16] {
            let options = |threads_per_device| CompileOptions { threads_per_device, precision, ..options(2, OneFOneB) };
            let plans = [1, 3].map(|threads| model().plan("data=2,stage=2", &options(threads)));
            assert_eq!(plans[0].hash(), plans[1].hash(), "{precision:?}");
            let bytes = plans.each_ref().map(|plan| plan.memory(0).total_bytes());
            // In bf16, a launch that converts operands to f32 needs the most scratch memory, for any number of threads.
            assert!(bytes[0] < bytes[1] || precision == Precision::BF16, "{precision:?}: {bytes:?}");
            for threads in [1, 3] {
                let mut session = model().session("data=2,stage=2", &options(threads));
                drop(model().step(&mut session));
                let devices = session.metrics().devices;
                let as_planned = devices.iter().all(|d| d.allocated_bytes == d.planned_peak_bytes);
                assert!(as_planned, "{precision:?}, {threads} threads: {devices:?}");
            }
        }
    });
}

/// If a session uses all cores of its process, the plan has memory for these cores. The loss has the same bits as with
/// one thread.
#[test]
fn a_session_can_use_all_cores_of_its_process() {
    within(60, || {
        let plan_options = options(2, OneFOneB);
        let run = |threads| {
            let options = SessionOptions { threads, ..SessionOptions::default() };
            let mut session = Session::start(model().plan(ONE, &plan_options), &options).expect("starts");
            let loss = model().step(&mut session).loss.expect("a loss");
            let devices = session.metrics().devices;
            assert!(devices.iter().all(|d| d.allocated_bytes == d.planned_peak_bytes), "{threads:?}: {devices:?}");
            (session.plan().threads_per_device, loss.to_bits())
        };
        let cores = std::thread::available_parallelism().expect("cores").get();
        let ((planned, loss), (owned, same)) = (run(Threads::Planned), run(Threads::Owned));
        assert_eq!((planned, owned, same), (1, cores.min(THREADS_MAX), loss));
    });
}

#[test]
fn one_f_one_b_needs_less_memory_than_gpipe() {
    let bytes = |schedule| {
        let plan = model().plan("stage=4", &options(8, schedule));
        plan.memories().map(|m| m.total_bytes()).collect::<Vec<_>>()
    };
    let (gpipe, one) = (bytes(GPipe), bytes(OneFOneB));
    // The first stage has 7 of 8 micro-batches in flight (with the latency of a transfer), and the last stage has 1.
    assert!(one.iter().zip(&gpipe).all(|(a, b)| a < b), "1F1B {one:?} bytes, GPipe {gpipe:?} bytes");
    assert!(one[3] * 3 < gpipe[3] * 2, "1F1B {one:?} bytes, GPipe {gpipe:?} bytes");
}

#[test]
fn a_plan_that_does_not_fit_is_refused_with_the_numbers() {
    let needed = model().plan("data=2", &options(1, OneFOneB)).memories().map(|m| m.total_bytes()).max();
    let needed = needed.expect("two devices");
    let compile_in = |bytes| {
        let options = CompileOptions { memory_bytes: Some(bytes), ..options(1, OneFOneB) };
        compile(model().graph("data=2"), &options)
    };
    assert!(compile_in(needed).is_ok());
    let error = compile_in(needed - 1).expect_err("one byte too few");
    assert!(matches!(error, CompileError::Plan(PlanError::Memory { .. })), "{error}");
    let text = error.to_string();
    for part in
        [&format!("device may use {} bytes", needed - 1), "device 0: ", "device 1: ", &format!("{needed} bytes = ")]
    {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}
