//! The state shared by all attempts of a launcher, and the events that the launcher waits for.

use std::path::PathBuf;
use std::{io, thread};

use crossbeam_channel::{Receiver, Sender, select};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};

use super::guard::{FOLDER_PREFIX, Guard};
use super::options::{LaunchError, LaunchOptions, check, find_program, variables};
use crate::departure::Departure;
use crate::env::{Endpoint, EnvError, SecretSource};
use crate::exit::{Report, unix_ns};
use crate::machine::temporary_folder;
use crate::options::ClusterOptions;
use crate::output;
use crate::requests::on_each_signal;
use crate::secret::Secret;
use crate::transport::PrivateFolder;

/// Capacity of the event queue. A sender waits while the queue is full.
const EVENTS_MAX: usize = 64;

pub(super) enum Event {
    /// The process with this local rank has ended and has not been reaped.
    Ended(usize),
    Signal(u8),
}

pub(super) struct Job<'a> {
    pub(super) options: &'a LaunchOptions,
    /// Resolved path of the program.
    pub(super) program: PathBuf,
    pub(super) run_id: String,
    /// When the job began: Unix time in milliseconds.
    pub(super) began_ms: u64,
    pub(super) secret: Secret,
    /// Private folder of this launcher, removed when the launcher ends.
    pub(super) folder: PrivateFolder,
    pub(super) events: (Sender<Event>, Receiver<Event>),
    pub(super) guard: Guard,
    /// The exit codes of the attempts so far.
    pub(super) causes: Vec<u8>,
    departure: Option<Departure>,
    /// Each reporting thread holds a clone of the sender. So the receiver is disconnected once all reports are sent.
    reports: (Sender<()>, Receiver<()>),
}

/// Blocks until `done` has a value or is disconnected, or until a signal other than SIGUSR1 arrives.
pub(super) fn wait_until_done_or_signal<T>(done: &Receiver<T>, events: &Receiver<Event>) -> Option<T> {
    loop {
        select! {
            recv(done) -> value => return value.ok(),
            recv(events) -> event => match event {
                Ok(Event::Signal(signal)) if i32::from(signal) != SIGUSR1 => return None,
                _ => {}
            },
        }
    }
}

pub(super) fn print_notice(text: &str) {
    output::stderr().line(&format!("shardflow: {text}"));
}

impl<'a> Job<'a> {
    pub(super) fn prepare(options: &'a LaunchOptions, departure: Option<Departure>) -> Result<Job<'a>, LaunchError> {
        // The handlers must be installed first: process 1 of a container ignores signals without a handler.
        let events = crossbeam_channel::bounded(EVENTS_MAX);
        let sender: Sender<Event> = events.0.clone();
        let forward = move |signal| drop(sender.send(Event::Signal(signal as u8)));
        let watched = on_each_signal(&[SIGTERM, SIGUSR1], &[SIGHUP, SIGINT, SIGQUIT], forward);
        watched.map_err(LaunchError::io("watch for signals"))?;
        check(options)?;
        let program = find_program(options)?;
        let variables = variables(options);
        ClusterOptions::read(&variables).map_err(|error| match &error {
            EnvError::Option { name, .. } if options.variables.iter().any(|(given, _)| given == name) => {
                let flag = name.trim_start_matches("SHARDFLOW_").replace('_', "-").to_lowercase();
                LaunchError::Refused(format!("--{flag}: {error}"))
            }
            _ => error.into(),
        })?;
        let secret = match SecretSource::find(&variables)? {
            Some(source) => source.read()?,
            None if options.nodes > 1 => {
                return Err(LaunchError::Refused(format!(
                    "{} nodes need a secret: set SHARDFLOW_SECRET to the same text of at least 16 characters on each \
                     node; run `export SHARDFLOW_SECRET=$(shardflow secret)` on one node, and copy the value to the \
                     others",
                    options.nodes
                )));
            }
            None => random_secret()?,
        };
        let run_id = match &options.run_id {
            Some(name) => name.clone(),
            // The time puts log folders in order. Random characters distinguish jobs that start in the same second.
            None => format!("{}-{}", unix_ns() / 1_000_000_000, &random_secret()?.text()[..6]),
        };
        let folder = temporary_folder(FOLDER_PREFIX).map_err(|error| LaunchError::Refused(error.to_string()))?;
        let guard = Guard::start(&options.helper, folder.path()).map_err(LaunchError::io("start the guard process"))?;
        let began_ms = unix_ns() / 1_000_000;
        let (causes, reports) = (Vec::new(), crossbeam_channel::bounded(0));
        Ok(Job { options, program, run_id, began_ms, secret, folder, events, guard, causes, departure, reports })
    }

    /// Reports to the other nodes, on a new thread, that a process failed before the rendezvous or that this node ends.
    pub(super) fn report(&self, report: Report) {
        let Some(departure) = self.departure.clone().filter(|_| report.concerns_all()) else { return };
        let count = if report.departed { self.options.local_processes } else { 1 };
        if report.departed {
            print_notice("reporting the end of this node to the other nodes; a signal (Ctrl-C) stops the report");
        }
        let pending = self.reports.0.clone();
        let send = move || {
            departure.report(report.rank..report.rank + count, &report);
            drop(pending);
        };
        // If the thread cannot start, the other nodes wait until they time out.
        let _ = thread::Builder::new().name("report".into()).spawn(send);
    }

    /// Reports to the other nodes that no process of this node joins. True if a process of another node waits for them.
    pub(super) fn is_missed(&self, report: Report) -> bool {
        let Some(departure) = self.departure.clone() else { return false };
        print_notice("no process of this node joined the rendezvous; reporting this to the nodes that wait");
        let ranks = report.rank..report.rank + self.options.local_processes;
        let (sender, missed) = crossbeam_channel::bounded(1);
        let send = move || sender.send(departure.report(ranks, &report));
        // If the thread cannot start, the channel is closed, and the other nodes wait until they time out.
        let _ = thread::Builder::new().name("report".into()).spawn(send);
        wait_until_done_or_signal(&missed, &self.events.1).unwrap_or(false)
    }

    pub(super) fn wait_for_reports(&mut self) {
        let (sender, done) = std::mem::replace(&mut self.reports, crossbeam_channel::bounded(0));
        drop(sender);
        wait_until_done_or_signal(&done, &self.events.1);
    }

    pub(super) fn progress_file(&self) -> PathBuf {
        self.folder.path().join("progress")
    }

    /// The rendezvous endpoint of an attempt. Each attempt has its own Unix socket, because an old socket may remain.
    pub(super) fn endpoint(&self, attempt: u64) -> Result<Endpoint, LaunchError> {
        match &self.options.endpoint {
            Some(endpoint) => Ok(endpoint.clone()),
            None => {
                let path = self.folder.path().join(format!("meet-{attempt}"));
                let place = format!("cannot use {} for the rendezvous", path.display());
                let refused =
                    |expected, fix| LaunchError::Refused(format!("{place}: expected {expected}; set TMPDIR to {fix}"));
                let text = path.to_str().ok_or_else(|| refused("UTF-8", "a path in UTF-8"))?;
                Endpoint::parse(&format!("unix:{text}")).map_err(|expected| refused(expected, "a shorter path"))
            }
        }
    }
}

fn random_secret() -> Result<Secret, LaunchError> {
    Secret::random().map_err(|e| LaunchError::Io { action: "make a secret".into(), source: io::Error::other(e) })
}
