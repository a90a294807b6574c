//! The `pd-control` command.

use std::process::ExitCode;

use clap::Parser;
use pd_control::cli::arguments::Cli;
use pd_control::cli::output::complain;
use pd_control::cli::run::run;

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}
