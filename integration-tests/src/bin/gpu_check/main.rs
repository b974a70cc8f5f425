//! Shardflow's commands for `integration-tests/gpu/check.sh`. They report versions, measure copies and matrix products,
//! train GPT-2, time and compare its launches, and train with delays on several devices that share one GPU. Each
//! command prints one line of JSON.

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

/// Shardflow's part of the checks on a machine with a GPU.
#[derive(Debug, Parser)]
#[command(name = "gpu_check", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print the driver, the devices and the libraries, and fail if one of these is missing.
    Versions,
    /// Measure device copies and matrix products through cuBLASLt.
    Ceilings(bench::CeilingArgs),
    /// Train a GPT by the same rules as `gpt2_torch.py`.
    Train(train::TrainArgs),
    /// Time each distinct launch of a training step.
    Launches(launches::LaunchArgs),
    /// Run each distinct launch of a training step on the device and on the CPU backend, and compare the outputs.
    Compare(model::ModelArgs),
    /// Train on four devices that share one GPU, with and without delays on its streams.
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

/// The JSON that a command prints, and the errors that it found.
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
    let mut value_or_error = |result: std::result::Result<Value, String>| {
        result.unwrap_or_else(|error| {
            wrong.push(error.clone());
            json!({ "error": error })
        })
    };
    let driver = value_or_error(probe.driver.map(Value::from).map_err(|e| e.to_string()));
    let devices: Vec<Value> = probe
        .devices
        .into_iter()
        .map(|device| {
            value_or_error(device.map_err(|e| e.to_string()).map(|device| {
                let (major, minor) = device.capability;
                json!({ "name": device.name, "capability": format!("{major}.{minor}"), "bytes": device.bytes_total })
            }))
        })
        .collect();
    let libraries: serde_json::Map<String, Value> = probe
        .libraries
        .into_iter()
        .map(|(library, version)| {
            (library.name().to_owned(), value_or_error(version.map(Value::from).map_err(|e| e.to_string())))
        })
        .collect();
    if devices.is_empty() && wrong.is_empty() {
        wrong.push("the driver reports no device".to_owned());
    }
    let version = env!("CARGO_PKG_VERSION");
    let json = json!({ "shardflow": version, "driver": driver, "devices": devices, "libraries": libraries });
    Ok(Found { json, wrong })
}
