//! The command line.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Output, Stdio};

use crate::client::{CHAT, chat};

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pd-sim"));
    command.args(args);
    command
}

fn output(args: &[&str]) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = command(args).output().unwrap();
    (status.code(), String::from_utf8([stdout, stderr].concat()).unwrap())
}

#[test]
fn says_when_it_is_ready_and_exits_1_on_a_busy_port_or_a_crash() {
    let args = ["--listen", "127.0.0.1:0", "--role", "decode", "--speed", "0", "--fault", "exit"];
    let mut child = Running(command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(child.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.strip_prefix("pd-sim decode listening on ").unwrap().split(' ').next().unwrap();
    let (code, said) = output(&["--listen", address]);
    assert_eq!(code, Some(1));
    assert_eq!(said, format!("pd-sim: cannot listen on {address}: another process has that port\n"));

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let address = address.parse().unwrap();
    let _client = runtime.block_on(crate::client::begin(address, CHAT, &chat("x", "")));
    assert_eq!(child.0.wait().unwrap().code(), Some(1));
    line.clear();
    BufReader::new(child.0.stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("the engine died"), "{line}");
}

#[test]
fn refuses_bad_options_in_one_line() {
    for (args, why) in [
        (["--engine", "vllm-shared"], "--engine vllm-shared needs --shared-dir"),
        (["--speed", "1e9"], "--speed must be"),
        (["--block-tokens", "0"], "--block-tokens"),
        (["--lease-s", "1e9"], "--lease-s"),
        (["--fault", "bogus"], "no such kind"),
    ] {
        let (code, said) = output(&[args[0], args[1]]);
        assert!(matches!(code, Some(1 | 2)), "{args:?}: {said}");
        assert!(said.contains(why), "{args:?}: {said}");
    }
}
