//! The driver's functions for streams and events.
#![allow(unsafe_code, non_snake_case)]

use std::ffi::{c_int, c_uint, c_void};

use cudarc::driver::sys::{CUcontext, CUevent, CUhostFn, CUresult, CUstream};

use crate::export::exports;
use crate::scheduler::{host_wait, synchronise};
use crate::world::{Event, OpKind, State, machine};

const STREAM_NON_BLOCKING: c_uint = 1;
const EVENT_DISABLE_TIMING: c_uint = 2;

fn create(flags: c_uint, priority: c_int) -> Result<CUstream, CUresult> {
    let mut state = machine().state();
    let device = state.device()?;
    if flags > STREAM_NON_BLOCKING {
        return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    Ok(state.add_stream(device, flags == STREAM_NON_BLOCKING, priority) as CUstream)
}

fn event(state: &State, handle: CUevent) -> Result<&Event, CUresult> {
    let event = state.events.get(&(handle as u64)).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?;
    match state.devices[event.device].error {
        Some(error) => Err(error),
        None => Ok(event),
    }
}

exports! { driver;
    fn cuStreamCreate(stream: *mut CUstream, flags: c_uint) -> CUresult {
        *stream = create(flags, 0)?;
        Ok(())
    }

    fn cuStreamCreateWithPriority(stream: *mut CUstream, flags: c_uint, priority: c_int) -> CUresult {
        *stream = create(flags, priority)?;
        Ok(())
    }

    fn cuStreamGetPriority(stream: CUstream, priority: *mut c_int) -> CUresult {
        let state = machine().state();
        *priority = state.streams[&state.stream(stream as u64)?].priority;
        Ok(())
    }

    fn cuStreamGetCtx(stream: CUstream, ctx: *mut CUcontext) -> CUresult {
        let state = machine().state();
        let device = state.streams[&state.stream(stream as u64)?].device;
        *ctx = ((device + 1) << 8) as CUcontext;
        Ok(())
    }

    fn cuStreamDestroy_v2(stream: CUstream) -> CUresult {
        let mut state = machine().state();
        if (stream as u64) <= 2 {
            return Err(CUresult::CUDA_ERROR_INVALID_HANDLE);
        }
        // Streams of a lost device can still be destroyed.
        let found = state.streams.get_mut(&(stream as u64)).filter(|s| !s.is_destroyed);
        let found = found.ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?;
        found.is_destroyed = true;
        state.remove_if_finished(stream as u64);
        Ok(())
    }

    fn cuStreamQuery(stream: CUstream) -> CUresult {
        let mut state = machine().state();
        let handle = state.stream(stream as u64)?;
        if !state.streams[&handle].is_idle() {
            state.polls += 1;
            machine().submitted.notify_all();
            return Err(CUresult::CUDA_ERROR_NOT_READY);
        }
        let clock = state.streams[&handle].clock.clone();
        state.host(machine().config.one_host).clock.join(&clock);
        Ok(())
    }

    fn cuStreamSynchronize(stream: CUstream) -> CUresult {
        synchronise(machine(), stream as u64)
    }

    fn cuStreamWaitEvent(stream: CUstream, awaited: CUevent, _flags: c_uint) -> CUresult {
        let mut state = machine().state();
        let handle = state.stream(stream as u64)?;
        // A wait for an event that was never recorded has no effect. Such a wait is usually a bug.
        let Some(signal) = event(&state, awaited)?.last.clone() else {
            let name = format!("event {:#x}", awaited as u64);
            let message = || format!("a stream waits for {name}, which was never recorded");
            machine().report_finding("misuse", &name, message);
            return Ok(());
        };
        state.submit(machine(), handle, OpKind::Wait(signal), format!("wait for event {:#x}", awaited as u64));
        Ok(())
    }

    fn cuLaunchHostFunc(stream: CUstream, function: CUhostFn, data: *mut c_void) -> CUresult {
        let mut state = machine().state();
        let handle = state.stream(stream as u64)?;
        if function.is_none() {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        state.submit(machine(), handle, OpKind::Host { function, data: data as usize }, "host function");
        Ok(())
    }

    fn cuEventCreate(out: *mut CUevent, flags: c_uint) -> CUresult {
        let mut state = machine().state();
        let device = state.device()?;
        let handle = state.handle();
        state.events.insert(handle, Event { device, last: None, has_time: flags & EVENT_DISABLE_TIMING == 0 });
        *out = handle as CUevent;
        Ok(())
    }

    fn cuEventRecord(recorded: CUevent, stream: CUstream) -> CUresult {
        let mut state = machine().state();
        let handle = state.stream(stream as u64)?;
        if event(&state, recorded)?.device != state.streams[&handle].device {
            return Err(CUresult::CUDA_ERROR_INVALID_HANDLE);
        }
        let signal = state.record(machine(), handle, &format!("event {:#x}", recorded as u64));
        state.events.get_mut(&(recorded as u64)).expect("looked up above").last = Some(signal);
        Ok(())
    }

    fn cuEventQuery(queried: CUevent) -> CUresult {
        let mut state = machine().state();
        let Some(signal) = event(&state, queried)?.last.clone() else { return Ok(()) };
        match signal.done.get() {
            Some((clock, _)) => {
                state.host(machine().config.one_host).clock.join(clock);
                Ok(())
            }
            None => {
                state.polls += 1;
                machine().submitted.notify_all();
                Err(CUresult::CUDA_ERROR_NOT_READY)
            }
        }
    }

    fn cuEventSynchronize(awaited: CUevent) -> CUresult {
        let state = machine().state();
        let found = event(&state, awaited)?;
        let device = found.device;
        let Some(signal) = found.last.clone() else { return Ok(()) };
        let mut state = host_wait(machine(), state, device, |_| signal.done.get().is_some())?;
        if let Some((clock, _)) = signal.done.get() {
            state.host(machine().config.one_host).clock.join(clock);
        }
        Ok(())
    }

    fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: CUevent, end: CUevent) -> CUresult {
        let state = machine().state();
        let mut times = Vec::new();
        for handle in [start, end] {
            let event = event(&state, handle)?;
            let signal = event.last.as_ref().filter(|_| event.has_time).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?;
            times.push(signal.done.get().ok_or(CUresult::CUDA_ERROR_NOT_READY)?.1);
        }
        *milliseconds = times[1].saturating_duration_since(times[0]).as_secs_f32() * 1e3;
        Ok(())
    }

    fn cuEventDestroy_v2(destroyed: CUevent) -> CUresult {
        machine().state().events.remove(&(destroyed as u64)).map(|_| ()).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)
    }
}
