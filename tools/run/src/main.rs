//! Starts prefill/decode routing on one machine and stops it again: engines, `pd-control` and Envoy. `make run` calls it.

mod banner;
mod engines;
mod envoy;
mod launch;
mod ports;
mod probe;
mod process;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use pd_core::wire::Engine;

/// Starts engine simulators (or takes your own engines), pd-control and Envoy with the filter, and waits.
///
/// Ctrl-C stops all of it. Run it from the repository's root; `make run` builds what it needs first.
#[derive(Debug, Parser)]
#[command(name = "pd-run", version, max_term_width = 120)]
struct Args {
    /// Envoy to run [default: the one that envoy/fetch.sh installs]
    #[arg(long, value_name = "PATH")]
    envoy: Option<PathBuf>,
    /// Your own prefill engines in place of simulators
    #[arg(long, value_name = "HOST:PORT,…", value_delimiter = ',', requires = "decode")]
    prefill: Vec<String>,
    /// Your own decode engines in place of simulators
    #[arg(long, value_name = "HOST:PORT,…", value_delimiter = ',', requires = "prefill")]
    decode: Vec<String>,
    /// A real vLLM pair with a tiny random model, which tests/vllm/install.sh installs, in place of simulators
    #[arg(long, conflicts_with = "prefill")]
    vllm: bool,
    /// Hand-over protocol of your own engines: vllm-nixl or vllm-shared
    #[arg(long, value_parser = engines::parse_engine, default_value = "vllm-nixl")]
    engine: Engine,
    /// Model for the printed curl line [default: the first that a decode engine names]
    #[arg(long)]
    model: Option<String>,
    /// Factor on the simulators' times: 1 real, 0.1 ten times faster, 0 at once
    #[arg(long, default_value_t = 1.0)]
    speed: f64,
    /// Folder for logs and rendered files
    #[arg(long, value_name = "PATH", default_value = "target/run")]
    directory: PathBuf,
    /// Number to add to every listening port, if the usual ports are taken
    #[arg(long, value_name = "N", default_value_t = 0)]
    port_offset: u16,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match launch::run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pd-run: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn own_engines_come_in_both_roles_or_not_at_all() {
        assert!(Args::try_parse_from(["pd-run", "--prefill", "a:1"]).is_err());
        assert!(Args::try_parse_from(["pd-run", "--decode", "a:1"]).is_err());
        let args = Args::try_parse_from(["pd-run", "--prefill", "a:1,b:2", "--decode", "c:3"]).unwrap();
        assert_eq!((args.prefill.len(), args.decode.len()), (2, 1));
        assert!(Args::try_parse_from(["pd-run", "--vllm", "--prefill", "a:1", "--decode", "c:3"]).is_err());
    }
}
