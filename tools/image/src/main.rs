//! Command line: makes, pushes and pulls our images.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};
use pd_image::manifest::Image;
use pd_image::registry::Registry;
#[cfg(feature = "start")]
use pd_image::start::check as check_start;

/// OCI images of the filter's module, for Envoy Gateway, and of programs.
#[derive(Parser)]
#[command(name = "pd-image", version, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write the image as an OCI image layout and print its digest; refuse a module that does not start
    Make {
        /// The filter's module
        #[arg(long, value_name = "FILE", required_unless_present = "program", conflicts_with = "program")]
        module: Option<PathBuf>,
        /// A static program, for an image that runs it
        #[arg(long, value_name = "FILE")]
        program: Option<PathBuf>,
        /// Folder for the layout
        #[arg(long, value_name = "DIRECTORY")]
        layout: PathBuf,
    },
    /// Push a layout and print the image's name by digest
    Push {
        /// Registry, repository and tag, such as registry.example/pd-filter:0.1.0
        image: String,
        /// The layout
        #[arg(long, value_name = "DIRECTORY")]
        layout: PathBuf,
        /// File to write the name into, as `image=…`, and the version, for `pd-control check`
        #[arg(long, value_name = "FILE")]
        pin: Option<PathBuf>,
        /// Speak plain HTTP to the registry
        #[arg(long)]
        plain_http: bool,
    },
    /// Push an index of images that the registry has, one for each architecture, and print its name by digest
    PushIndex {
        /// Registry, repository and tag, such as registry.example/pd-control:0.1.0
        image: String,
        /// The index, which is pushed byte for byte
        #[arg(long, value_name = "FILE")]
        index: PathBuf,
        /// Speak plain HTTP to the registry
        #[arg(long)]
        plain_http: bool,
    },
    /// Say whether Envoy could run the image of a file: pull it by digest, start its module and send it a request
    Check {
        /// File with `image=…`
        file: PathBuf,
        /// Speak plain HTTP to the registry
        #[arg(long)]
        plain_http: bool,
    },
    /// Pull an image and write its module
    Pull {
        /// Registry, repository and tag or digest
        image: String,
        /// File for the module
        #[arg(long, value_name = "FILE")]
        module: PathBuf,
        /// Speak plain HTTP to the registry
        #[arg(long)]
        plain_http: bool,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Cli::parse().command).await {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("pd-image: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(not(feature = "start"))]
fn check_start(_: &[u8]) -> anyhow::Result<()> {
    bail!("this pd-image was built without its feature `start`, so it makes and checks no images of modules")
}

async fn run(command: Command) -> anyhow::Result<String> {
    match command {
        Command::Make { module, program, layout } => {
            let read = |file: &Path| fs::read(file).with_context(|| file.display().to_string());
            let image = match (&module, &program) {
                (Some(module), _) => {
                    let bytes = read(module)?;
                    check_start(&bytes).with_context(|| module.display().to_string())?;
                    Image::new(&bytes)?
                }
                (None, Some(program)) => {
                    let name = program.file_name().and_then(|name| name.to_str()).context("a program has a name")?;
                    Image::of_program(name, &read(program)?).with_context(|| program.display().to_string())?
                }
                (None, None) => bail!("name a module or a program"),
            };
            pd_image::layout::write(&image, &layout)?;
            Ok(image.manifest.digest)
        }
        Command::Push { image, layout, pin, plain_http } => {
            let content = pd_image::layout::read(&layout)?;
            let name = Registry::new(&image, plain_http)?.push(&content).await.with_context(|| image.clone())?;
            let pulled = Registry::new(&name, plain_http)?.pull().await.with_context(|| name.clone())?;
            if pulled != content {
                bail!("{name}: the registry has something else than was pushed");
            }
            if let Some(file) = pin {
                let text = format!("image={name}\nversion={}\n", env!("CARGO_PKG_VERSION"));
                fs::write(&file, text).with_context(|| file.display().to_string())?;
            }
            Ok(name)
        }
        Command::PushIndex { image, index, plain_http } => {
            let bytes = fs::read(&index).with_context(|| index.display().to_string())?;
            Registry::new(&image, plain_http)?.push_index(bytes).await.with_context(|| image.clone())
        }
        Command::Check { file, plain_http } => {
            let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            let name = text.lines().find_map(|line| line.strip_prefix("image="));
            let name = name.with_context(|| format!("{}: there is no image=", file.display()))?;
            if !name.contains("@sha256:") {
                bail!("{name}: name it by digest, else Envoy Gateway may go on with what it has");
            }
            let module = Registry::new(name, plain_http)?.pull().await.and_then(|image| image.module());
            let module =
                module.and_then(|module| check_start(&module).map(|()| module)).with_context(|| name.to_owned())?;
            Ok(format!("{name}: ok, {} bytes of module", module.len()))
        }
        Command::Pull { image, module, plain_http } => {
            let content = Registry::new(&image, plain_http)?.pull().await.with_context(|| image.clone())?;
            fs::write(&module, content.module()?).with_context(|| module.display().to_string())?;
            Ok(content.manifest.digest)
        }
    }
}
