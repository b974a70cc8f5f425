//! Traces of all processes of a job on one clock.
//!
//! Each file tells the Unix time at which its times begin, so files of one machine agree to the microsecond, and those of several
//! as well as their clocks do. Where that would have a piece read before it was written, the reader's file is moved by what is
//! missing, and no file further than that.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::CLOCK;

/// Why files do not make one trace.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// One is none of ours.
    #[error("file {file} is no trace that Shardflow wrote: {source}")]
    Format {
        /// Counted from 1.
        file: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// One does not tell when it began.
    #[error("file {file} does not tell its clock, so it cannot be put beside others")]
    Clock {
        /// Counted from 1.
        file: usize,
    },
    /// Two tell of one actor.
    #[error("files {first} and {second} both have '{actor}': give the files of all processes of one run")]
    Twice {
        /// Counted from 1.
        first: usize,
        /// Counted from 1.
        second: usize,
        /// Its name.
        actor: String,
    },
}

/// An event of a file; those of all kinds.
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

#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Args {
    pub name: Option<String>,
    pub step: Option<u64>,
    pub pass: Option<u64>,
    pub waited_us: Option<f64>,
    pub cause: Option<String>,
    pub register: Option<String>,
    pub step_us: Option<f64>,
    pub idle_us: Option<BTreeMap<String, f64>>,
    pub unix_ns: Option<u64>,
}

/// The events of all files.
#[derive(Debug)]
pub struct JoinedTrace {
    pub(super) events: Vec<Event>,
    /// By file: what its times are moved by, microseconds.
    shifts_us: Vec<f64>,
}

impl JoinedTrace {
    /// Of the files' texts.
    ///
    /// # Errors
    /// [`JoinError`].
    pub fn of(texts: &[String]) -> Result<Self, JoinError> {
        let parse = |(index, text): (usize, &String)| {
            events_of(text).map_err(|source| JoinError::Format { file: index + 1, source })
        };
        let mut files: Vec<Vec<Event>> = texts.iter().enumerate().map(parse).collect::<Result<_, _>>()?;
        once(&files)?;
        let shifts_us = if files.len() > 1 { shifts(&files)? } else { vec![0.0; files.len()] };
        for (events, shift) in files.iter_mut().zip(&shifts_us) {
            events.iter_mut().for_each(|event| event.ts += shift);
        }
        Ok(Self { events: files.into_iter().flatten().collect(), shifts_us })
    }

    /// Writes one file of them, in the form of each; from the same texts.
    ///
    /// # Errors
    /// When it cannot be written.
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

/// The events of a file. A file truncated at any byte, as by a killed process, has its complete ones.
fn events_of<T: DeserializeOwned>(text: &str) -> serde_json::Result<Vec<T>> {
    serde_json::from_str(text).or_else(|error| {
        let (whole, torn) = text.rsplit_once(",\n").unwrap_or(("[", text.trim_start_matches(['[', '\n'])));
        let torn = torn.trim_end_matches(',');
        let is_ours = text.is_empty() || text.starts_with('[');
        if !is_ours || !(error.is_eof() || is_torn_text(torn)) {
            return Err(error);
        }
        let mut events: Vec<T> = serde_json::from_str(&format!("{whole}\n]"))?;
        events.extend(serde_json::from_str::<T>(torn));
        Ok(events)
    })
}

/// Whether a file's end was never written, though its length was: zeros, or a part of a character.
fn is_torn_text(text: &str) -> bool {
    text.ends_with(['\0', char::REPLACEMENT_CHARACTER])
}

/// No two files have an actor in common.
fn once(files: &[Vec<Event>]) -> Result<(), JoinError> {
    let mut known = HashMap::new();
    for (index, events) in files.iter().enumerate() {
        for event in events.iter().filter(|event| event.name == "thread_name") {
            let first = *known.entry(event.tid).or_insert(index + 1);
            if first != index + 1 {
                let actor = event.args.name.clone().unwrap_or_default();
                return Err(JoinError::Twice { first, second: index + 1, actor });
            }
        }
    }
    Ok(())
}

/// By file: what brings its times, microseconds, to those of the one that began first.
fn shifts(files: &[Vec<Event>]) -> Result<Vec<f64>, JoinError> {
    let clock = |(index, events): (usize, &Vec<Event>)| {
        let told = events.iter().find(|event| event.name == CLOCK).and_then(|event| event.args.unix_ns);
        told.ok_or(JoinError::Clock { file: index + 1 })
    };
    let began = files.iter().enumerate().map(clock).collect::<Result<Vec<u64>, _>>()?;
    let first = began.iter().min().copied().unwrap_or_default();
    let mut shifts: Vec<f64> = began.iter().map(|ns| (ns - first) as f64 * 1e-3).collect();
    let mut written: HashMap<&str, (usize, f64)> = HashMap::new();
    for (index, events) in files.iter().enumerate() {
        written.extend(events.iter().filter(|e| e.ph == "s").map(|e| (e.id.as_str(), (index, e.ts))));
    }
    // By writing and reading file: the least time between a piece's writing and its reading, as the files have it.
    let mut least: BTreeMap<(usize, usize), f64> = BTreeMap::new();
    for (index, events) in files.iter().enumerate() {
        for event in events.iter().filter(|e| e.ph == "f") {
            if let Some((from, at)) = written.get(event.id.as_str()).filter(|(from, _)| *from != index) {
                let least = least.entry((*from, index)).or_insert(f64::INFINITY);
                *least = least.min(event.ts - at);
            }
        }
    }
    // A file that is moved may move another, and so on through all of them.
    for _ in 0..files.len() {
        for ((from, to), least) in &least {
            shifts[*to] = shifts[*to].max(shifts[*from] - least);
        }
    }
    Ok(shifts)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of one actor that began at a second, with the ends of arrows that it has.
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
    fn files_are_put_on_one_clock() {
        // The second file began a second later, and reads what the first wrote half a second before.
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
        assert!(joined.events.iter().map(|e| e.ts).filter(|ts| *ts > 1e6).eq(times), "a summary sees what is written");
    }

    #[test]
    fn no_piece_is_read_before_it_is_written() {
        // The clock of the second machine is ten seconds behind, and the third has its pieces from there.
        let files = [
            file(0, 20, &[("s", "1", 5e6)]),
            file(1, 10, &[("f", "1", 5e6), ("s", "2", 6e6)]),
            file(2, 20, &[("f", "2", 4e6)]),
        ];
        assert_eq!(shifts_of(&files), [10e6, 10e6, 12e6]);
        // In whatever order they are given.
        let turned: Vec<String> = files.iter().rev().cloned().collect();
        assert_eq!(shifts_of(&turned), [12e6, 10e6, 10e6]);
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let refused = |files: &[String]| JoinedTrace::of(files).unwrap_err().to_string();
        let (a, b) = (file(0, 1, &[]), file(0, 2, &[]));
        let text = "files 1 and 2 both have 'a0': give the files of all processes of one run";
        assert_eq!(refused(&[a.clone(), b]), text);
        let text = "file 2 does not tell its clock, so it cannot be put beside others";
        assert_eq!(refused(&[a.clone(), "[]".into()]), text);
        for bad in ["{", "[{\"name\":1}]", "text"] {
            assert!(
                refused(&[a.clone(), bad.into()]).starts_with("file 2 is no trace that Shardflow wrote: "),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_file_that_is_cut_anywhere_has_its_whole_events() {
        let events: Vec<String> =
            ["a", "\u{e4}\u{1f600}", "c"].map(|name| format!(r#"{{"name":"{name}","ph":"X","ts":12.5}}"#)).into();
        let text = format!("[\n{}\n]\n", events.join(",\n"));
        let names = |bytes: &[u8]| -> Vec<String> {
            let text = String::from_utf8_lossy(bytes).into_owned();
            JoinedTrace::of(&[text])
                .unwrap_or_else(|e| panic!("{e}: {bytes:?}"))
                .events
                .into_iter()
                .map(|e| e.name)
                .collect()
        };
        let ends: Vec<usize> = events.iter().map(|event| text.find(event.as_str()).unwrap() + event.len()).collect();
        for cut in 0..=text.len() {
            let whole = ends.iter().filter(|end| **end <= cut).count();
            assert_eq!(names(&text.as_bytes()[..cut]).len(), whole, "cut after {cut} bytes");
            // As a file system may leave it whose machine has lost power.
            let zeros = [&text.as_bytes()[..cut], &[0; 9]].concat();
            let found = if cut == 0 { 0 } else { names(&zeros).len() };
            assert!(found == whole || found + 1 == whole, "{found} of {whole}, zeros after {cut} bytes");
        }
    }

    #[test]
    fn a_file_with_nothing_in_it_is_no_reason_to_refuse_the_others() {
        assert_eq!(JoinedTrace::of(&["[".into()]).unwrap().events.len(), 0);
        assert_eq!(JoinedTrace::of(&["[\n".into()]).unwrap().events.len(), 0);
    }
}
