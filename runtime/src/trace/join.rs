//! Joins the traces of all processes of a job on one clock.
//!
//! Each file contains the Unix time of its time 0, so files of one machine agree to the microsecond. Files of several
//! machines agree only as closely as the machines' clocks. If a piece would be read before it was written, the reader's
//! file is shifted by the smallest time that prevents this.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::CLOCK;

/// Why files cannot be joined to one trace.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages explain the fields")]
#[error("{}", self.with_names(|file| format!("file {file}")))]
pub enum JoinError {
    /// A file is not a trace of Shardflow.
    Format {
        file: usize,
        source: serde_json::Error,
    },
    NoClock {
        file: usize,
    },
    DuplicateActor {
        first: usize,
        second: usize,
        actor: String,
    },
}

impl JoinError {
    /// The text of this error. `name` returns the name of a file for its index; indices start at 1.
    pub fn with_names(&self, name: impl Fn(usize) -> String) -> String {
        match self {
            Self::Format { file, source } => format!("{} is not a trace written by Shardflow: {source}", name(*file)),
            Self::NoClock { file } => format!("{} has no clock event, so it cannot be joined with others", name(*file)),
            Self::DuplicateActor { first, second, actor } => {
                let (first, second) = (name(*first), name(*second));
                format!("{first} and {second} both contain actor '{actor}': pass the files of one run, one per process")
            }
        }
    }
}

/// An event of a file, with the fields of all kinds of events.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Event {
    pub name: String,
    pub ph: String,
    #[serde(default)]
    pub tid: u32,
    #[serde(default)]
    pub ts: f64,
    #[serde(default)]
    pub dur: f64,
    #[serde(default)]
    pub id: String,
    #[serde(default)]
    pub args: Args,
}

impl Event {
    pub(super) fn end(&self) -> f64 {
        self.ts + self.dur
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Args {
    pub name: String,
    pub step: u64,
    /// Index of the pass over the plan.
    pub pass: u64,
    pub waited_us: f64,
    pub cause: String,
    pub register: String,
    pub step_us: Option<f64>,
    pub idle_us: Option<BTreeMap<String, f64>>,
    pub unix_ns: Option<u64>,
}

/// The events of all files.
#[derive(Debug)]
pub struct JoinedTrace {
    pub(super) events: Vec<Event>,
    /// Shift of each file's times, in microseconds.
    shifts_us: Vec<f64>,
}

impl JoinedTrace {
    /// Joins files, given as texts.
    pub fn of(texts: &[String]) -> Result<Self, JoinError> {
        let parse = |(index, text): (usize, &String)| {
            events_of(text).map_err(|source| JoinError::Format { file: index + 1, source })
        };
        let mut files: Vec<Vec<Event>> = texts.iter().enumerate().map(parse).collect::<Result<_, _>>()?;
        check_actors_unique(&files)?;
        let shifts_us = if files.len() > 1 { shifts(&files)? } else { vec![0.0; files.len()] };
        for (events, shift) in files.iter_mut().zip(&shifts_us) {
            events.iter_mut().for_each(|event| event.ts += shift);
        }
        Ok(Self { events: files.into_iter().flatten().collect(), shifts_us })
    }

    /// Writes the joined trace as one file. `texts` are the texts given to [`JoinedTrace::of`].
    pub fn write(&self, texts: &[String], mut out: impl Write) -> io::Result<()> {
        let mut separator = "[\n";
        for (text, shift) in texts.iter().zip(&self.shifts_us) {
            for mut event in events_of::<serde_json::Value>(text)? {
                if let Some(ts) = event["ts"].as_f64() {
                    event["ts"] = (ts + shift).into();
                }
                write!(out, "{separator}{event}")?;
                separator = ",\n";
            }
        }
        out.write_all(b"\n]\n")?;
        out.flush()
    }
}

/// Parses a file's events. If the file is truncated, for instance by a killed process, returns the complete ones.
fn events_of<T: DeserializeOwned>(text: &str) -> serde_json::Result<Vec<T>> {
    serde_json::from_str(text).or_else(|error| {
        let (whole, torn) = text.rsplit_once(",\n").unwrap_or(("[", text.trim_start_matches(['[', '\n'])));
        let torn = torn.trim_end_matches(',');
        let is_list = text.is_empty() || text.starts_with('[');
        if !is_list || !(error.is_eof() || is_torn_text(torn)) {
            return Err(error);
        }
        let mut events: Vec<T> = serde_json::from_str(&format!("{whole}\n]"))?;
        events.extend(serde_json::from_str::<T>(torn));
        Ok(events)
    })
}

/// True if a file's last bytes were not written, although its length counts them: it ends with zeros or a partial
/// character.
fn is_torn_text(text: &str) -> bool {
    text.ends_with(['\0', char::REPLACEMENT_CHARACTER])
}

fn check_actors_unique(files: &[Vec<Event>]) -> Result<(), JoinError> {
    let mut known = HashMap::new();
    for (index, events) in files.iter().enumerate() {
        for event in events.iter().filter(|event| event.name == "thread_name") {
            let first = *known.entry(event.tid).or_insert(index + 1);
            if first != index + 1 {
                let actor = event.args.name.clone();
                return Err(JoinError::DuplicateActor { first, second: index + 1, actor });
            }
        }
    }
    Ok(())
}

/// The number of microseconds by which each file's times are shifted to the clock of the file that began first.
fn shifts(files: &[Vec<Event>]) -> Result<Vec<f64>, JoinError> {
    let clock = |(index, events): (usize, &Vec<Event>)| {
        let unix_ns = events.iter().find(|event| event.name == CLOCK).and_then(|event| event.args.unix_ns);
        unix_ns.ok_or(JoinError::NoClock { file: index + 1 })
    };
    let began = files.iter().enumerate().map(clock).collect::<Result<Vec<u64>, _>>()?;
    let first = began.iter().min().copied().unwrap_or_default();
    let mut shifts: Vec<f64> = began.iter().map(|ns| (ns - first) as f64 * 1e-3).collect();
    let mut written: HashMap<&str, (usize, f64)> = HashMap::new();
    for (index, events) in files.iter().enumerate() {
        written.extend(events.iter().filter(|e| e.ph == "s").map(|e| (e.id.as_str(), (index, e.ts))));
    }
    // For each pair of a writing and a reading file: the smallest time from a piece's write to its read, where each
    // time comes from its own file's clock.
    let mut smallest: BTreeMap<(usize, usize), f64> = BTreeMap::new();
    for (index, events) in files.iter().enumerate() {
        for event in events.iter().filter(|e| e.ph == "f") {
            if let Some((from, at)) = written.get(event.id.as_str()).filter(|(from, _)| *from != index) {
                let delay = smallest.entry((*from, index)).or_insert(f64::INFINITY);
                *delay = delay.min(event.ts - at);
            }
        }
    }
    // Shifting one file may require shifting another one. The longest such chain contains all files.
    for _ in 0..files.len() {
        for ((from, to), delay) in &smallest {
            shifts[*to] = shifts[*to].max(shifts[*from] - delay);
        }
    }
    Ok(shifts)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that began at `unix_s` seconds, with one actor and these ends of arrows.
    fn file(actor: u32, unix_s: u64, ends: &[(&str, &str, f64)]) -> String {
        let unix_ns = unix_s * 1_000_000_000;
        let named = format!(r#"{{"name":"thread_name","ph":"M","pid":0,"tid":{actor},"args":{{"name":"a{actor}"}}}}"#);
        let clock = format!(r#"{{"name":"clock","ph":"M","pid":0,"args":{{"unix_ns":{unix_ns}}}}}"#);
        let end = |(phase, id, ts): &(&str, &str, f64)| {
            format!(r#"{{"name":"r","ph":"{phase}","id":"{id}","pid":0,"tid":{actor},"ts":{ts}}}"#)
        };
        let events: Vec<String> = [clock, named].into_iter().chain(ends.iter().map(end)).collect();
        format!("[{}]", events.join(","))
    }

    fn shifts_of(files: &[String]) -> Vec<f64> {
        JoinedTrace::of(files).unwrap().shifts_us
    }

    #[test]
    fn files_are_shifted_to_one_clock() {
        // The second file began one second later, and reads a piece that the first file wrote half a second earlier.
        let files =
            [file(0, 7, &[("s", "1", 1.5e6), ("f", "2", 3e6)]), file(1, 8, &[("f", "1", 1e6), ("s", "2", 1.1e6)])];
        assert_eq!(shifts_of(&files), [0.0, 1e6]);
        let joined = JoinedTrace::of(&files).unwrap();
        let mut out = Vec::new();
        joined.write(&files, &mut out).unwrap();
        let written = String::from_utf8(out).unwrap();
        let times: Vec<f64> =
            JoinedTrace::of(&[written]).unwrap().events.iter().map(|e| e.ts).filter(|ts| *ts > 0.0).collect();
        assert_eq!(times, [1.5e6, 3e6, 2e6, 2.1e6]);
        assert!(
            joined.events.iter().map(|e| e.ts).filter(|ts| *ts > 1e6).eq(times),
            "a summary sees the same times as the joined file"
        );
    }

    #[test]
    fn no_piece_is_read_before_it_is_written() {
        // The clock of the second machine is ten seconds behind, and the third machine reads the second one's pieces.
        let files = [
            file(0, 20, &[("s", "1", 5e6)]),
            file(1, 10, &[("f", "1", 5e6), ("s", "2", 6e6)]),
            file(2, 20, &[("f", "2", 4e6)]),
        ];
        assert_eq!(shifts_of(&files), [10e6, 10e6, 12e6]);
        // The order of the files does not matter.
        let reversed: Vec<String> = files.iter().rev().cloned().collect();
        assert_eq!(shifts_of(&reversed), [12e6, 10e6, 10e6]);
    }

    #[test]
    fn files_that_do_not_form_one_trace_are_refused() {
        let refused = |files: &[String]| JoinedTrace::of(files).unwrap_err().to_string();
        let (a, b) = (file(0, 1, &[]), file(0, 2, &[]));
        let text = "file 1 and file 2 both contain actor 'a0': pass the files of one run, one per process";
        assert_eq!(refused(&[a.clone(), b]), text);
        let text = "file 2 has no clock event, so it cannot be joined with others";
        assert_eq!(refused(&[a.clone(), "[]".into()]), text);
        for bad in ["{", "[{\"name\":1}]", "text"] {
            assert!(
                refused(&[a.clone(), bad.into()]).starts_with("file 2 is not a trace written by Shardflow: "),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_truncated_file_keeps_its_complete_events() {
        let events: Vec<String> =
            ["a", "\u{e4}\u{1f600}", "c"].map(|name| format!(r#"{{"name":"{name}","ph":"X","ts":12.5}}"#)).into();
        let text = format!("[\n{}\n]\n", events.join(",\n"));
        let names = |bytes: &[u8]| -> Vec<String> {
            let text = String::from_utf8_lossy(bytes).into_owned();
            let joined = JoinedTrace::of(&[text]).unwrap_or_else(|e| panic!("{e}: {bytes:?}"));
            joined.events.into_iter().map(|e| e.name).collect()
        };
        let ends: Vec<usize> = events.iter().map(|event| text.find(event.as_str()).unwrap() + event.len()).collect();
        // The first cuts leave a file without events.
        for cut in 0..=text.len() {
            let complete = ends.iter().filter(|end| **end <= cut).count();
            assert_eq!(names(&text.as_bytes()[..cut]).len(), complete, "cut after {cut} bytes");
            // A file system may append zeros after a power loss.
            let zeros = [&text.as_bytes()[..cut], &[0; 9]].concat();
            let found = if cut == 0 { 0 } else { names(&zeros).len() };
            assert!(found == complete || found + 1 == complete, "{found} of {complete} events before zeros at {cut}");
        }
    }
}
