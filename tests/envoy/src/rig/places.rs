//! Where the parts of one gateway are: ports, files, and the processes that use them.

use std::path::{Path, PathBuf};

use pd_support::places;
use pd_support::port::Port;
use pd_support::process::{self, Process};
use pd_support::wait::PATIENCE;
use tempfile::TempDir;

/// Workers of every Envoy here: what one knows, the other must learn.
pub const WORKERS: usize = 2;

/// Ports and files of one gateway.
pub(crate) struct Places {
    pub(crate) listener: Port,
    pub(crate) admin: Port,
    pub(crate) control: Port,
    pub(crate) control_options: Vec<String>,
    pub(crate) directory: TempDir,
}

impl Places {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        // Envoy watches directories: each kind of file has its own.
        for name in ["eds", "lds"] {
            std::fs::create_dir(directory.path().join(name)).expect("a directory");
        }
        Self {
            listener: Port::reserve(),
            admin: Port::reserve(),
            control: Port::reserve(),
            control_options: Vec::new(),
            directory,
        }
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn endpoints(&self) -> PathBuf {
        self.file("endpoints.yaml")
    }

    pub(crate) fn eds(&self) -> PathBuf {
        self.file("eds/eds.json")
    }

    pub(crate) fn lds(&self) -> PathBuf {
        self.file("lds/lds.json")
    }

    pub(crate) async fn start_control(&self) -> Process {
        let own = [
            format!("--endpoints={}", self.endpoints().display()),
            format!("--eds-file={}", self.eds().display()),
            format!("--listen={}", self.control.address()),
        ];
        let arguments = [&own[..], &self.control_options].concat();
        let control = Process::start("pd-control", self.directory.path(), &places::control(), &arguments);
        let ready = process::ready(&control, self.control.address(), "/readyz", PATIENCE).await;
        ready.unwrap_or_else(|error| panic!("{error}"));
        control
    }

    pub(crate) fn start_envoy(&self, config: &Path) -> Process {
        let config = config.display().to_string();
        let workers = WORKERS.to_string();
        let arguments = [
            ["--config-path", &config],
            ["--concurrency", &workers],
            // The access log is read while it is written.
            ["--file-flush-interval-msec", "10"],
        ];
        let arguments = arguments.concat().into_iter().chain(["--disable-hot-restart"]).map(str::to_owned);
        Process::start("envoy", self.directory.path(), &places::envoy(), &arguments.collect::<Vec<_>>())
    }
}
