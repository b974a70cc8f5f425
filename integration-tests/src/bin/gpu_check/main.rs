//! Our side of `integration-tests/gpu/check.sh`: what is here, how fast it copies and multiplies, GPT-2 trained, its launches
//! timed and compared one by one, and several devices on one GPU with delays. Each command prints one line of JSON.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use serde_json::{Value, json};
use shardflow_kernels::cuda::probe;

mod bench;
mod launches;
mod model;
mod train;
mod virtual_devices;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Our side of the checks on a machine with a GPU.
#[derive(Debug, Parser)]
#[command(name = "gpu_check", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Driver, devices and libraries; fails where something is missing.
    Versions,
    /// How fast the device copies, and how fast it multiplies through our cuBLASLt path.
    Ceilings(bench::CeilingArgs),
    /// Trains a GPT by rules that `gpt2_torch.py` follows, too.
    Train(train::TrainArgs),
    /// Times each different launch of a training step by itself.
    Launches(launches::LaunchArgs),
    /// Runs each different launch of a training step on the device and on the CPU backend, and compares.
    Compare(model::ModelArgs),
    /// Trains on four devices that share one GPU, with and without delays on its streams.
    Virtual(virtual_devices::VirtualArgs),
}

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Versions => versions(),
        Command::Ceilings(args) => bench::ceilings(&args),
        Command::Train(args) => train::run(&args),
        Command::Launches(args) => launches::time(&args),
        Command::Compare(args) => launches::compare(&args),
        Command::Virtual(args) => virtual_devices::run(&args),
    };
    match result {
        Ok(found) => {
            println!("{}", found.json);
            if found.wrong.is_empty() {
                return ExitCode::SUCCESS;
            }
            found.wrong.iter().for_each(|wrong| eprintln!("error: {wrong}"));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What a command prints, and what is not as it should be.
struct Found {
    json: Value,
    wrong: Vec<String>,
}

impl From<Value> for Found {
    fn from(json: Value) -> Self {
        Self { json, wrong: Vec::new() }
    }
}

fn versions() -> Result<Found> {
    let probe = probe();
    let mut wrong = Vec::new();
    let mut told = |result: std::result::Result<Value, String>| {
        result.unwrap_or_else(|error| {
            wrong.push(error.clone());
            json!({ "error": error })
        })
    };
    let driver = told(probe.driver.map(Value::from).map_err(|e| e.to_string()));
    let devices: Vec<Value> = probe
        .devices
        .into_iter()
        .map(|device| {
            told(device.map_err(|e| e.to_string()).map(|device| {
                let (major, minor) = device.capability;
                json!({ "name": device.name, "capability": format!("{major}.{minor}"), "bytes": device.bytes_total })
            }))
        })
        .collect();
    let libraries: serde_json::Map<String, Value> = probe
        .libraries
        .into_iter()
        .map(|(library, version)| {
            (library.name().to_owned(), told(version.map(Value::from).map_err(|e| e.to_string())))
        })
        .collect();
    if devices.is_empty() && wrong.is_empty() {
        wrong.push("the driver shows no device".to_owned());
    }
    let version = env!("CARGO_PKG_VERSION");
    let json = json!({ "shardflow": version, "driver": driver, "devices": devices, "libraries": libraries });
    Ok(Found { json, wrong })
}
