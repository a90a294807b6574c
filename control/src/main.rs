//! The `pd-control` command.

use std::process::ExitCode;

use clap::Parser;
use pd_control::cli::arguments::Cli;

fn main() -> ExitCode {
    match pd_control::cli::arguments::run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("pd-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}
