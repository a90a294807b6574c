//! Simulates the autoscaling of both roles over loads that change: `make sim-autoscale`.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use pd_bench::figures::table;
use pd_bench::plot::{self, Bar, Graph, Panel, Series};
use pd_trace::autoscale::{Outcome, Phase, ROLES, Scaling, Setup, load, oracle, repeated, run, there_and_back};

/// Simulates autoscaling by pd-control's signals and the HorizontalPodAutoscaler, beside an oracle that knows the load.
///
/// One load turns from long prompts to long answers and back; another has new prompts, then one prompt again and again. Writes
/// a CSV file with every second and a picture of each.
#[derive(Parser)]
#[command(name = "pd-autoscale", version, max_term_width = 120)]
struct Args {
    /// Folder for CSV and SVG files
    #[arg(long, default_value = "target/autoscale")]
    out: PathBuf,
    /// Minutes of each phase of a load
    #[arg(long, default_value_t = 90)]
    minutes: u64,
    /// Seconds that a new server takes until it is ready
    #[arg(long, default_value_t = 60)]
    start_s: u64,
    /// Seed of the load
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Do not look for an oracle: load the oracle's servers up to these shares, prefill and decode
    #[arg(long, num_args = 2)]
    shares: Option<Vec<f64>>,
    /// Key of the prefill trigger's metadata, such as prefillBusy=0.8 (repeatable)
    #[arg(long = "prefill", value_parser = pair)]
    prefill: Vec<(String, String)>,
    /// Key of the decode trigger's metadata, such as kvLoad=0.8 (repeatable)
    #[arg(long = "decode", value_parser = pair)]
    decode: Vec<(String, String)>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn main() -> ExitCode {
    match simulate(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pd-autoscale: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn simulate(args: Args) -> Result<()> {
    std::fs::create_dir_all(&args.out)?;
    let metadata = |pairs: &[(String, String)]| pairs.iter().cloned().collect::<HashMap<_, _>>();
    let setup = Setup {
        start: Duration::from_secs(args.start_s),
        metadata: [metadata(&args.prefill), metadata(&args.decode)],
        ..Setup::default()
    };
    let length = Duration::from_secs(args.minutes * 60);
    let loads: [(&str, Vec<Phase>); 2] =
        [("there-and-back", there_and_back(length).to_vec()), ("repeated", repeated(length).to_vec())];
    for (name, phases) in loads {
        let requests = load(&phases, args.seed);
        eprintln!("pd-autoscale: {name}, {} requests", requests.len());
        let ours = run(&requests, Scaling::Autoscaler, &setup)?;
        let (shares, best) = match args.shares.as_deref() {
            Some(&[prefill, decode]) => {
                let shares = [prefill, decode];
                (shares, run(&requests, Scaling::Oracle(shares), &setup)?)
            }
            _ => oracle(&requests, 0.95, &setup)?,
        };
        println!("{name}; the oracle loads servers up to {:.2} and {:.2}", shares[0], shares[1]);
        let row = |who: &str, outcome: &Outcome| {
            let [prefill, decode] = outcome.server_seconds;
            let sum = outcome.server_seconds.iter().sum::<f64>() / best.server_seconds.iter().sum::<f64>();
            let [first, second] = outcome.turns();
            vec![
                who.to_owned(),
                format!("{:.1}", outcome.goodput() * 100.0),
                format!("{prefill:.0}"),
                format!("{decode:.0}"),
                format!("{sum:.3}"),
                format!("{first}"),
                format!("{second}"),
            ]
        };
        let head = ["", "goodput %", "prefill s", "decode s", "of the oracle's", "turns P", "turns D"];
        let head = head.map(str::to_owned).to_vec();
        println!("{}", table(&[head, row("autoscaler", &ours), row("oracle", &best)]));
        std::fs::write(args.out.join(format!("{name}.csv")), csv(&ours, &best))?;
        picture(&args.out.join(format!("{name}.svg")), name, &ours, &best)?;
    }
    println!("{}", args.out.display());
    Ok(())
}

fn csv(ours: &Outcome, best: &Outcome) -> String {
    let mut text = "second,prefill,decode,prefill_needed,decode_needed,prefill_waiting,decode_waiting,prefill_oracle,decode_oracle\n".to_owned();
    for (second, (at, oracle)) in ours.seconds.iter().zip(&best.seconds).enumerate() {
        let ([p, d], [pn, dn], [pw, dw], [po, d_o]) = (at.servers, at.needed, at.waiting, oracle.servers);
        let _ = writeln!(text, "{second},{p},{d},{pn:.3},{dn:.3},{pw},{dw},{po},{d_o}");
    }
    text
}

fn picture(path: &Path, name: &str, ours: &Outcome, best: &Outcome) -> Result<()> {
    let graph = |role: usize| {
        let line = |outcome: &Outcome, of: &dyn Fn(&pd_trace::autoscale::Second) -> f64, colour| Series {
            points: outcome
                .seconds
                .iter()
                .enumerate()
                .step_by(30)
                .map(|(second, it)| (second as f64 / 60.0, of(it)))
                .collect(),
            colour,
            joined: true,
        };
        let servers = |it: &pd_trace::autoscale::Second| it.servers[role] as f64;
        Graph {
            title: format!("{} servers", ROLES[role]),
            x: "minutes".to_owned(),
            log_x: false,
            log_y: false,
            series: vec![line(ours, &|it| it.needed[role], 0), line(best, &servers, 2), line(ours, &servers, 5)],
        }
    };
    let bar = |outcome: &Outcome, colour| {
        let hours = outcome.server_seconds.iter().sum::<f64>() / 3_600.0;
        Bar { label: format!("{hours:.1}"), value: hours, range: (hours, hours), series: colour }
    };
    let panel = Panel { title: "server-hours".to_owned(), bars: vec![bar(ours, 5), bar(best, 2)] };
    let legend = [("autoscaler", 5), ("oracle", 2), ("needed at full use", 0)];
    plot::graphs(path, &format!("Autoscaling: {name}"), &legend, &[graph(0), graph(1)], Some(&panel))
}
