//! The launcher as a newcomer meets it: it runs, it is asked, it is stopped, and things are in its way.

mod launcher;

use std::net::TcpListener;
use std::process::Command;

use launcher::{Launcher, port_offset};
use pd_support::port::Port;
use pd_support::process;

#[test]
fn the_printed_command_is_split_and_ctrl_c_leaves_nothing() {
    let mut launcher = Launcher::start(&[]);
    let command = launcher.wait_ready();
    let answer = Command::new("bash").args(["-c", &command]).output().unwrap();
    let text = String::from_utf8_lossy(&answer.stdout);
    assert!(text.contains("\"finish_reason\":\"length\""), "{command}\n{text}");
    let line = launcher.wait_line("\"decision\"");
    assert!(line.contains("\"decision\":\"split\"") && line.contains("\"status\":200"), "{line}");

    let children = launcher.children();
    assert_eq!(children.len(), 6, "four engines, pd-control and Envoy");
    launcher.signal("INT");
    let ended = launcher.wait_end();
    assert!(ended.success && ended.stderr.is_empty(), "{ended:?}");
    launcher::assert_gone(&children);
    launcher.assert_ports_free();
    launcher.assert_no_temporary_files();
}

#[test]
fn the_tour_of_readme_goes_as_it_says() {
    let readme = std::fs::read_to_string(pd_support::places::root().join("README.md")).unwrap();
    let tour = readme.split("\n## Tour\n").nth(1).unwrap().split("\n## ").next().unwrap();
    let text: String = tour.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    let text = text.replace("\\\n", " ");
    let commands: Vec<_> = text.lines().filter(|line| line.starts_with("curl ")).collect();
    let [chat, endpoints, metrics, legs] = commands[..] else { panic!("{commands:?}") };
    let short = chat.replace("seq -s ' ' 800", "seq -s ' ' 8");
    assert_ne!(short, chat);

    let mut launcher = Launcher::start(&[]);
    launcher.wait_ready();
    for (command, expected) in [
        (chat, r#""decision":"split""#),
        (chat, r#""reason":"cached""#),
        (&short, r#""reason":"short""#),
        (&format!("{chat} -H 'x-pd-phase: decode'"), r#""reason":"phase_header""#),
    ] {
        let answer = launcher.run(command);
        assert!(answer.contains("\"finish_reason\""), "{command}\n{answer}");
        let line = launcher.wait_line("\"decision\"");
        assert!(line.contains(expected), "{command}\n{line}");
    }
    for (command, expected) in
        [(endpoints, "\"role\": \"prefill\""), (metrics, "decision=\"split\""), (legs, "\"decode")]
    {
        // The filter sends its counts to Envoy at its next tick.
        launcher::wait(command, || launcher.run(command).contains(expected));
    }
    launcher.signal("INT");
    assert!(launcher.wait_end().success);
}

#[test]
fn a_killed_launcher_leaves_no_process() {
    let mut launcher = Launcher::start(&[]);
    launcher.wait_ready();
    let children = launcher.children();
    launcher.signal("KILL");
    launcher.wait_end();
    launcher::wait_gone(&children);
}

#[test]
fn a_child_that_dies_is_one_line_and_the_end() {
    let mut launcher = Launcher::start(&[]);
    launcher.wait_ready();
    let children = launcher.children();
    process::signal(children[0], "KILL");
    let ended = launcher.wait_end();
    assert!(!ended.success);
    let line = ended.stderr.trim_end();
    assert!(line.starts_with("pd-run: the prefill simulator on 127.0.0.1:") && line.contains("signal: 9"), "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
    launcher::assert_gone(&children);
}

#[test]
fn a_busy_port_is_one_line_before_anything_starts() {
    let offset = port_offset();
    let _gateway = TcpListener::bind(("127.0.0.1", 8080 + offset)).unwrap();
    let _engine = TcpListener::bind(("127.0.0.1", 8201 + offset)).unwrap();
    let mut launcher = Launcher::start_at(offset, &[]);
    let ended = launcher.wait_end();
    let expected = format!(
        "pd-run: port {} (for Envoy's gateway), port {} (for a decode simulator) are in use; ",
        8080 + offset,
        8201 + offset
    );
    assert!(!ended.success && ended.stderr.starts_with(&expected), "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1);
    assert!(!ended.stdout.contains("starting"), "{ended:?}");
}

#[test]
fn what_cannot_be_run_is_one_line_before_anything_starts() {
    for (arguments, why) in [
        (["--envoy", "/nowhere/envoy"].as_slice(), "pd-run: cannot start Envoy as /nowhere/envoy: "),
        (&["--envoy", "/bin/true"], "pd-run: /bin/true is no Envoy"),
        (
            &["--prefill", "127.0.0.1:1", "--decode", "gpu"],
            "pd-run: decode engine \"gpu\": has no port: write gpu:PORT",
        ),
        (
            &["--prefill", "127.0.0.1:1", "--decode", "127.0.0.1:1"],
            "pd-run: prefill and decode engine 127.0.0.1:1 cannot be reached: ",
        ),
    ] {
        let ended = Launcher::start(arguments).wait_end();
        assert!(!ended.success && ended.stderr.starts_with(why), "{ended:?}");
        assert_eq!(ended.stderr.lines().count(), 1);
        assert!(!ended.stdout.contains("starting"), "{ended:?}");
    }
}

#[test]
fn own_engines_take_the_place_of_simulators() {
    let reserved = [Port::reserve(), Port::reserve()];
    let ports = reserved.each_ref().map(|port| port.address().port());
    let mut engines = ports.map(|port| {
        let listen = format!("127.0.0.1:{port}");
        Command::new(launcher::sibling("pd-sim"))
            .args(["--listen", &listen, "--model", "mine", "--speed", "0"])
            .spawn()
            .unwrap()
    });
    ports.into_iter().for_each(launcher::wait_listening);
    let [prefill, decode] = [format!("localhost:{}", ports[0]), format!("127.0.0.1:{}", ports[1])];
    let mut launcher = Launcher::start(&["--prefill", &prefill, "--decode", &decode]);
    let command = launcher.wait_ready();
    assert!(command.contains("\"model\":\"mine\""), "{command}");
    assert_eq!(launcher.children().len(), 2, "pd-control and Envoy");
    Command::new("bash").args(["-c", &command]).output().unwrap();
    let line = launcher.wait_line("\"decision\"");
    for part in ["\"decision\":\"split\"", &format!(":{}\"", ports[0]), &format!("\"upstream\":\"{decode}\"")] {
        assert!(line.contains(part), "{line}");
    }
    launcher.signal("TERM");
    assert!(launcher.wait_end().success);
    for engine in &mut engines {
        assert!(engine.try_wait().unwrap().is_none(), "somebody's own engines go on");
        engine.kill().unwrap();
        engine.wait().unwrap();
    }
}
