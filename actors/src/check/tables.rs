//! Checks the writes and reads of a register. Each piece's accesses begin with one `first` access and end with one
//! `last` access. A slot holds one piece at a time, and no step overwrites a piece that a later step reads.

use super::error::SpecError;
use crate::spec::{ActionRef, PieceAccess, Pieces, RegisterId, RegisterSpec, Spec};

/// The progress of a piece's accesses within one step.
#[derive(Clone, Copy, PartialEq)]
enum Progress {
    None,
    /// The piece is begun but not ended. The number is the index of its latest access in the list of accesses.
    Open(usize),
    Ended,
}

/// An access to a piece, with the accessing action and the index of its firing within the step.
struct Port {
    action: u32,
    firing: u32,
    access: PieceAccess,
}

pub(super) fn check(spec: &Spec, id: RegisterId) -> Result<(), SpecError> {
    let register = spec.register(id);
    for reader in &register.readers {
        if let Some(Pieces::Table(table)) = spec.input(id, *reader).map(|input| &input.pieces) {
            let port = |(firing, access): (u32, &PieceAccess)| Port { action: reader.action, firing, access: *access };
            let reads: Vec<_> = (0..).zip(&**table).map(port).collect();
            check_flags(spec, id, *reader, &reads, "read")?;
        }
    }
    let plain = |(action, port): (u32, u32)| {
        let action = spec.action(register.producer, action);
        matches!(action.outputs[port as usize].pieces, Pieces::Rate(_))
    };
    let writers: Vec<_> = spec.writers(id).collect();
    if writers.len() == 1 && writers.iter().all(|writer| plain(*writer)) && register.slot_of.is_empty() {
        // One writer that fills a ring in order of piece numbers cannot fail the checks below, since `check_slots` has
        // shown that the initial pieces fit.
        return Ok(());
    }
    let mut fired = vec![0; spec.actor(register.producer).actions.len()];
    let port = |(action, access): (u32, PieceAccess)| {
        fired[action as usize] += 1;
        Port { action, firing: fired[action as usize] - 1, access }
    };
    let writes: Vec<_> = spec.writes(id).into_iter().map(port).collect();
    let producer = ActionRef { actor: register.producer, action: 0 };
    let ended = check_flags(spec, id, producer, &writes, "written")?;
    if let Some(piece) = (0..).zip(&ended).find_map(|(piece, progress)| (*progress == Progress::None).then_some(piece))
    {
        return Err(SpecError::Unwritten { register: register.name.clone(), piece });
    }
    check_order_of_slots(spec, id, &writes)
}

/// Checks that each piece's accesses begin with one `first` and end with one `last`. Returns the progress by piece.
fn check_flags(
    spec: &Spec,
    id: RegisterId,
    at: ActionRef,
    accesses: &[Port],
    done: &'static str,
) -> Result<Vec<Progress>, SpecError> {
    let register = spec.register(id);
    let name = |port: &Port| (spec.action_name(at.actor, port.action), register.name.clone());
    let wrong = |port: &Port, flag, expected: bool| {
        let ((action, register), (piece, got)) = (name(port), (port.access.piece, !expected));
        Err(SpecError::Flag { action, register, firing: port.firing, piece, flag, expected, got })
    };
    let mut progress = vec![Progress::None; register.pieces_per_step as usize];
    let mut closed_at = vec![0; progress.len()];
    for (at, port) in accesses.iter().enumerate() {
        let PieceAccess { piece, first, last } = port.access;
        match (progress[piece as usize], first) {
            (Progress::None, false) => return wrong(port, "first", true),
            (Progress::Open(_), true) => return wrong(port, "first", false),
            (Progress::Ended, false) => return wrong(&accesses[closed_at[piece as usize]], "last", false),
            (Progress::Ended, true) => {
                let (action, register) = name(port);
                return Err(SpecError::Twice { action, register, firing: port.firing, piece, done });
            }
            (Progress::None, true) | (Progress::Open(_), false) => {}
        }
        progress[piece as usize] = if last { Progress::Ended } else { Progress::Open(at) };
        closed_at[piece as usize] = at;
    }
    let open = progress.iter().find_map(|progress| match progress {
        Progress::Open(at) => Some(*at),
        _ => None,
    });
    open.map_or(Ok(progress.clone()), |at| wrong(&accesses[at], "last", true))
}

/// Replays the writes of one period, after which the assignment of pieces to slots repeats, and checks each slot.
/// A piece must be complete before the slot's next piece begins. No step may overwrite a piece that a later step reads.
fn check_order_of_slots(spec: &Spec, id: RegisterId, writes: &[Port]) -> Result<(), SpecError> {
    let register = spec.register(id);
    let RegisterSpec { name, pieces_per_step, initial, .. } = register;
    let per_step = u64::from(*pieces_per_step);
    let is_read = |piece: u64| {
        let within = (piece % per_step) as u32;
        register.readers.iter().any(|reader| spec.input(id, *reader).is_some_and(|input| input.pieces.contains(within)))
    };
    // For each slot: its latest piece, and whether that piece is complete.
    let mut latest: Vec<Option<(u64, bool)>> = vec![None; register.slots as usize];
    (0..u64::from(*initial)).for_each(|piece| latest[register.slot(piece) as usize] = Some((piece, true)));
    for written in 0..u64::from(register.period_steps()) {
        for Port { access, .. } in writes {
            let second = written * per_step + u64::from(access.piece) + u64::from(*initial);
            let slot = register.slot(second);
            if access.first
                && let Some((first, is_complete)) = latest[slot as usize]
            {
                let (register, read) = (name.clone(), first / per_step);
                if !is_complete {
                    return Err(SpecError::Overlap { register, first, second, slot });
                }
                if read > written && is_read(first) {
                    return Err(SpecError::Lag { register, first, second, slot, written, read });
                }
            }
            latest[slot as usize] = Some((second, access.last));
        }
    }
    Ok(())
}
