//! The `pd-control` command.

use std::process::ExitCode;

use clap::Parser;
use pd_control::cli::arguments::Cli;
use pd_control::cli::output::print_error;
use pd_control::cli::run::run;

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            print_error(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}
