//! Small plans of every shape that the protocol supports, for this crate's tests.

use std::sync::Arc;

use crate::builder::Builder;
use crate::pipeline::{Pipeline, PipelineSchedule};
use crate::spec::{ActionRef, Firing, Pieces, Spec, StreamKind};

/// All plans: name, plan, steps.
pub(crate) fn all() -> Vec<(&'static str, Arc<Spec>, u32)> {
    let piped =
        |credits: Vec<u32>, schedule, ordered| Pipeline { micro_batches: 6, credits, schedule, ordered }.build();
    let plans = [
        ("gpipe", piped(vec![6; 3], PipelineSchedule::Gpipe, false), 2),
        ("gpipe, ordered", piped(vec![6; 3], PipelineSchedule::Gpipe, true), 2),
        ("1f1b", piped(vec![4, 3, 2, 1], PipelineSchedule::OneForwardOneBackward, false), 2),
        ("1f1b, ordered", piped(vec![7, 5, 3, 1], PipelineSchedule::OneForwardOneBackward, true), 2),
        ("data parallel", data_parallel(), 3),
        ("skip connection", skip_connection(), 4),
        ("accumulation", accumulation(), 4),
        ("stale", stale(), 5),
        ("fan", fan(), 5),
        ("groups", groups(), 3),
        ("reversed", reversed(), 3),
        ("chunks", chunks(), 3),
        ("routes", routes(), 3),
        ("lagging", lagging(), 5),
        ("interleaved", interleaved(), 3),
    ];
    plans.into_iter().map(|(name, spec, steps)| (name, Arc::new(spec), steps)).collect()
}

/// Two replicas. The backwards publish two gradient buckets early to overlap the reduction. Updates are in place.
pub(crate) fn data_parallel() -> Spec {
    let mut b = Builder::new();
    for d in 0..2 {
        let compute = b.actor(format!("device{d}.compute"), d, Firing::Credit);
        let forward = b.external(compute, "forward", 2);
        let backward = b.action(compute, "backward", 2);
        b.action_mut(backward).priority = -1;
        b.edge(format!("device{d}.stash"), 2, forward, backward);
        let update = b.action(compute, "update", 1);
        let parameters = b.register(format!("device{d}.parameters"), 1, update, 1);
        b.register_mut(parameters).initial = 1;
        b.read(parameters, forward, 2);
        b.read(parameters, backward, 2);
        // Both devices must reduce the buckets in the same order.
        let reduce = b.actor(format!("device{d}.reduce"), d, Firing::Ordered(vec![0, 1]));
        b.actor_mut(reduce).stream = StreamKind::Communication;
        for bucket in 0..2 {
            let gradient = b.register(format!("device{d}.gradient{bucket}"), 1, backward, 2);
            b.early(gradient);
            let all_reduce = b.action(reduce, format!("all-reduce{bucket}"), 1);
            b.action_mut(all_reduce).groups = vec![0];
            b.read(gradient, all_reduce, 1);
            b.edge(format!("device{d}.reduced{bucket}"), 1, all_reduce, update);
        }
    }
    b.build()
}

/// A stage whose output goes to the next stage and also directly to the last one.
fn skip_connection() -> Spec {
    let mut b = Builder::new();
    let actors: Vec<_> = (0..3).map(|s| b.actor(format!("stage{s}"), s, Firing::Credit)).collect();
    let first = b.external(actors[0], "forward", 4);
    let (middle, last) = (b.action(actors[1], "forward", 4), b.action(actors[2], "forward", 4));
    let back = b.action(actors[0], "backward", 4);
    let h = b.register("h", 3, first, 1);
    b.read(h, middle, 1);
    b.read(h, last, 1);
    b.edge("around", 2, middle, last);
    b.edge("gradient", 1, last, back);
    b.edge("stash", 3, first, back);
    b.build()
}

/// Four micro-batches accumulate into one gradient; one update per step writes the parameters in place.
pub(crate) fn accumulation() -> Spec {
    let mut b = Builder::new();
    let host = b.actor("host", 0, Firing::Credit);
    let shard = b.actor("shard", 0, Firing::Credit);
    let feed = b.external(host, "feed", 4);
    let train = b.action(shard, "train", 4);
    let update = b.action(shard, "update", 1);
    b.edge("batch", 2, feed, train);
    let gradient = b.register("gradient", 1, train, 4);
    b.read(gradient, update, 1);
    let parameters = b.register("parameters", 1, update, 1);
    b.register_mut(parameters).initial = 1;
    b.read(parameters, train, 4);
    let metric = b.register("loss", 1, train, 4);
    let log = b.action(host, "log", 1);
    b.read(metric, log, 1);
    b.build()
}

/// Versioned state with bounded staleness: an initial register of two slots. Two firings read each version.
fn stale() -> Spec {
    let mut b = Builder::new();
    let (worker, server) = (b.actor("worker", 0, Firing::Credit), b.actor("server", 1, Firing::Credit));
    let work = b.external(worker, "work", 4);
    let update = b.external(server, "update", 2);
    let state = b.register("state", 2, update, 1);
    b.register_mut(state).initial = 1;
    b.read(state, work, 2);
    let report = b.action(server, "report", 2);
    let result = b.register("result", 2, work, 2);
    b.read(result, report, 1);
    b.build()
}

/// One source, three workers, one sink that needs all of them, and a register without readers.
pub(crate) fn fan() -> Spec {
    let mut b = Builder::new();
    let source = b.actor("source", 0, Firing::Credit);
    let split = b.external(source, "split", 3);
    let sink = b.actor("sink", 4, Firing::Credit);
    let join = b.action(sink, "join", 3);
    let whole = b.register("whole", 2, split, 1);
    b.register("unread", 1, join, 1);
    for w in 0..3 {
        let actor = b.actor(format!("worker{w}"), w + 1, Firing::Credit);
        let work = b.action(actor, "work", 3);
        b.read(whole, work, 1);
        b.edge(format!("part{w}"), w as u32 + 1, work, join);
    }
    b.build()
}

/// Two stages of two tensor-parallel shards with collectives in forward and backward; each actor has an ordered list.
pub(crate) fn groups() -> Spec {
    let mut b = Builder::new();
    let mut stages: Vec<Vec<(ActionRef, ActionRef)>> = Vec::new();
    for stage in 0..2u32 {
        let list = if stage == 0 { vec![0, 0, 1, 0, 1, 1] } else { vec![0, 1, 0, 1, 0, 1] };
        let mut shards = Vec::new();
        for shard in 0..2 {
            let device = stage as usize * 2 + shard;
            let actor = b.actor(format!("stage{stage}.shard{shard}"), device, Firing::Ordered(list.clone()));
            let (forward, backward) = (b.action(actor, "forward", 3), b.action(actor, "backward", 3));
            b.action_mut(forward).external = stage == 0;
            b.action_mut(forward).groups = vec![stage];
            b.action_mut(backward).groups = vec![stage];
            b.edge(format!("stage{stage}.shard{shard}.stash"), 2, forward, backward);
            shards.push((forward, backward));
        }
        stages.push(shards);
    }
    for (shard, (first, second)) in stages[0].iter().zip(&stages[1]).enumerate() {
        b.edge(format!("activation{shard}"), 2, first.0, second.0);
        b.edge(format!("gradient{shard}"), 2, second.1, first.1);
    }
    b.build()
}

/// Two stages. The second stage runs its backwards in the reverse order of the forwards, and so does the first stage.
pub(crate) fn reversed() -> Spec {
    let mut b = Builder::new();
    let order = Pieces::in_order(&[3, 2, 1, 0]);
    let mut stages = Vec::new();
    for s in 0..2 {
        let actor = b.actor(format!("stage{s}"), s, Firing::Credit);
        let (forward, backward) = (b.action(actor, "forward", 4), b.action(actor, "backward", 4));
        b.action_mut(forward).external = s == 0;
        let stash = b.register(format!("stage{s}.stash"), 4, forward, 1);
        b.read_pieces(stash, backward, order.clone());
        stages.push((forward, backward));
    }
    b.edge("activation", 2, stages[0].0, stages[1].0);
    // Pieces keep the numbers of their micro-batches. The slots follow the order of the firings.
    let gradient = b.channel("gradient", stages[1].0.actor, 2, 4);
    b.register_mut(gradient).slot_of = [1, 0, 1, 0].into();
    b.write(gradient, stages[1].1, order.clone());
    b.read_pieces(gradient, stages[0].1, order);
    b.build()
}

/// Two chunks of one device accumulate into the gradient of a shared weight.
pub(crate) fn chunks() -> Spec {
    let mut b = Builder::new();
    let list = vec![0, 1, 0, 1, 3, 2, 3, 2, 4];
    let device = b.actor("device", 0, Firing::Ordered(list.clone()));
    let forwards = [0, 1].map(|chunk| b.action(device, format!("forward{chunk}"), 2));
    let backwards = [0, 1].map(|chunk| b.action(device, format!("backward{chunk}"), 2));
    let host = b.actor("host", 0, Firing::Credit);
    let feed = b.external(host, "feed", 2);
    b.edge("batch", 3, feed, forwards[0]);
    b.edge("between", 1, forwards[0], forwards[1]);
    for chunk in 0..2 {
        b.edge(format!("stash{chunk}"), 2, forwards[chunk], backwards[chunk]);
    }
    b.edge("gradient", 1, backwards[1], backwards[0]);
    let update = b.action(device, "update", 1);
    let shared = b.channel("shared", device, 1, 1);
    let tables = Pieces::of_writers(&list, &[(2, &[0, 0]), (3, &[0, 0])]);
    for (backward, pieces) in backwards.into_iter().zip(tables) {
        b.write(shared, backward, pieces);
    }
    b.read(shared, update, 1);
    let reduce = b.actor("reduce", 0, Firing::Credit);
    let sum = b.action(reduce, "sum", 1);
    b.read(shared, sum, 1);
    b.edge("reduced", 1, sum, update);
    b.build()
}

/// Micro-batches take different routes. Two workers read alternate pieces, and one reads all. Nobody reads piece 5.
pub(crate) fn routes() -> Spec {
    let mut b = Builder::new();
    let (source, sink) = (b.actor("source", 0, Firing::Credit), b.actor("sink", 4, Firing::Credit));
    let split = b.external(source, "split", 6);
    let join = b.action(sink, "join", 5);
    let whole = b.register("whole", 3, split, 1);
    for (w, pieces) in [&[0, 2, 4][..], &[3, 1], &[0, 1, 2, 3, 4]].into_iter().enumerate() {
        let actor = b.actor(format!("worker{w}"), w + 1, Firing::Credit);
        let work = b.action(actor, "work", pieces.len() as u32);
        // Piece 3 is read before piece 1, so both need a slot at the same time.
        b.read_pieces(whole, work, Pieces::in_order(pieces));
        let part = b.register(format!("part{w}"), 2, work, 1);
        let rests: Vec<u32> = (0..5).map(|n| (n * pieces.len() as u32 / 5).min(pieces.len() as u32 - 1)).collect();
        b.read_pieces(part, join, Pieces::in_order(&rests));
    }
    b.register_mut(whole).slot_of = [0, 1, 2, 0, 2, 0].into();
    b.build()
}

/// A state whose readers lag three pieces behind the writer. Its slot table repeats after two steps.
pub(crate) fn lagging() -> Spec {
    let mut b = Builder::new();
    let (worker, server) = (b.actor("worker", 0, Firing::Credit), b.actor("server", 1, Firing::Credit));
    let work = b.external(worker, "work", 4);
    let update = b.action(server, "update", 2);
    let state = b.channel("state", server, 4, 2);
    b.register_mut(state).initial = 3;
    b.register_mut(state).slot_of = [0, 1, 2, 3].into();
    b.write(state, update, Pieces::in_order(&[1, 0]));
    b.read_pieces(state, work, Pieces::in_order(&[0, 1, 0, 1]));
    let result = b.register("result", 2, work, 2);
    b.read(result, update, 1);
    b.build()
}

/// One action accumulates into two pieces in turn. The reader reads the second piece first.
pub(crate) fn interleaved() -> Spec {
    let mut b = Builder::new();
    let (worker, reader) = (b.actor("worker", 0, Firing::Credit), b.actor("reader", 1, Firing::Credit));
    let work = b.external(worker, "work", 4);
    let sums = b.channel("sums", worker, 3, 2);
    b.register_mut(sums).slot_of = [0, 1, 2, 1].into();
    b.write(sums, work, Pieces::in_order(&[0, 1, 1, 0]));
    let take = b.action(reader, "take", 2);
    b.read_pieces(sums, take, Pieces::in_order(&[1, 0]));
    b.build()
}
