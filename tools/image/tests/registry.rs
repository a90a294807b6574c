//! The image in a real registry: Debian's `docker-registry`, or `PD_REGISTRY_BIN`, with a password.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use pd_image::manifest::{INDEX, MANIFEST};
use pd_support::places;
use pd_support::port::Port;

/// User pd, bcrypt of "secret".
const HTPASSWD: &str = "pd:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";

/// A module that Envoy takes, with its answer to the start.
fn module(start: &str) -> Vec<u8> {
    let text = format!(
        r#"(module (memory (export "memory") 1)
            (func (export "proxy_abi_version_0_2_1"))
            (func (export "malloc") (param i32) (result i32) (i32.const 1024))
            (func (export "proxy_on_vm_start") (param i32 i32) (result i32) {start}))"#
    );
    wat::parse_str(text).unwrap()
}

struct Registry {
    process: Child,
    address: String,
    _port: Port,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// `None` where no registry is installed.
fn start(directory: &Path) -> Option<Registry> {
    let program = std::env::var("PD_REGISTRY_BIN").unwrap_or_else(|_| "docker-registry".to_owned());
    let reserved = Port::reserve();
    let port = reserved.address().port();
    let htpasswd = directory.join("htpasswd");
    fs::write(&htpasswd, HTPASSWD).unwrap();
    let config = directory.join("registry.yml");
    let text = format!(
        "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n\
         auth: {{htpasswd: {{realm: test, path: {}}}}}\n",
        directory.join("blobs").display(),
        htpasswd.display(),
    );
    fs::write(&config, text).unwrap();
    let mut child =
        Command::new(program).arg("serve").arg(&config).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().ok()?;
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let registry = Registry { process: child, address: format!("127.0.0.1:{port}"), _port: reserved };
    let mut line = String::new();
    while !line.contains("listening on") {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0, "the registry ended");
    }
    // Its log must go on being read, or it would stand still.
    std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
    Some(registry)
}

fn image(docker: &Path, arguments: &[&str]) -> Result<String, String> {
    let done = Command::new(env!("CARGO_BIN_EXE_pd-image"))
        .args(arguments)
        .env("DOCKER_CONFIG", docker)
        .output()
        .expect("pd-image runs");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim().to_owned();
    if done.status.success() { Ok(text(done.stdout)) } else { Err(text(done.stderr)) }
}

/// Bytes of a manifest in a layout; of another one, any number.
fn manifest_size(layout: &Path, digest: &str) -> u64 {
    let path = layout.join("blobs/sha256").join(digest.trim_start_matches("sha256:"));
    fs::metadata(path).map_or(100, |file| file.len())
}

#[test]
fn a_module_that_would_not_start_gets_no_image() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    for (bytes, why) in [
        (b"\0asm\x01\0\0\0".to_vec(), "this is no Proxy-Wasm module"),
        (b"\0asm\x01\0\0\0proxy_abi_version_0_2_1".to_vec(), "it does not load"),
        (module("unreachable"), "it does not start"),
        (module("(i32.const 0)"), "it does not start"),
        (module("(i32.const 1)"), "asked for /.pd-ready it does not answer: it is another filter"),
    ] {
        fs::write(path("module.wasm"), bytes).unwrap();
        let refused = image(directory.path(), &["make", "--module", &path("module.wasm"), "--layout", &path("layout")]);
        let refused = refused.unwrap_err();
        assert!(refused.starts_with(&format!("pd-image: {}: {why}", path("module.wasm"))), "{refused}");
        assert_eq!(refused.lines().count(), 1, "{refused}");
        assert!(!Path::new(&path("layout")).exists());
    }
}

#[test]
fn an_image_is_pushed_pinned_and_pulled_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let Some(registry) = start(directory.path()) else {
        eprintln!("skipped: no docker-registry here (Debian, Ubuntu: apt-get install docker-registry)");
        return;
    };
    let (docker, stranger) = (directory.path().join("docker"), directory.path().join("nobody"));
    fs::create_dir(&docker).unwrap();
    // base64 of pd:secret, as `docker login` writes it.
    let auths = format!(r#"{{"auths": {{"{}": {{"auth": "cGQ6c2VjcmV0"}}}}}}"#, registry.address);
    fs::write(docker.join("config.json"), auths).unwrap();
    let module = places::wasm();
    let filter = fs::read(&module).expect("the module");
    let module = module.display().to_string();
    let digest = image(&docker, &["make", "--module", &module, "--layout", &path("layout")]).unwrap();
    assert_eq!(digest, image(&docker, &["make", "--module", &module, "--layout", &path("again")]).unwrap());

    let tagged = format!("{}/pd/filter:1", registry.address);
    let refused = image(&stranger, &["push", &tagged, "--layout", &path("layout")]).unwrap_err();
    assert!(refused.starts_with(&format!("pd-image: {tagged}: ")), "{refused}");

    let pinned = image(&docker, &["push", &tagged, "--layout", &path("layout"), "--pin", &path("pin")]).unwrap();
    assert_eq!(pinned, format!("{}/pd/filter@{digest}", registry.address));
    assert_eq!(
        fs::read_to_string(path("pin")).unwrap(),
        format!("image={pinned}\nversion={}\n", env!("CARGO_PKG_VERSION"))
    );
    assert_eq!(image(&docker, &["push", &tagged, "--layout", &path("again")]).unwrap(), pinned);

    let names = |digest: &str| {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{{"mediaType":"{MANIFEST}","digest":"{digest}","size":{},"#,
            manifest_size(Path::new(&path("layout")), digest)
        ) + r#""platform":{"architecture":"amd64","os":"linux"}}]}"#
    };
    let push_index = |index: &str| {
        fs::write(path("index.json"), index).unwrap();
        image(&docker, &["push-index", &format!("{}/pd/filter:both", registry.address), "--index", &path("index.json")])
    };
    let index = names(&digest);
    let by_digest = format!("{}/pd/filter@{}", registry.address, pd_image::manifest::digest(index.as_bytes()));
    assert_eq!(push_index(&index).unwrap(), by_digest);
    let refused = push_index(&names(&format!("sha256:{}", "1".repeat(64)))).unwrap_err();
    assert!(refused.starts_with(&format!("pd-image: {}/pd/filter:both: ", registry.address)), "{refused}");

    let checked = image(&docker, &["check", &path("pin")]).unwrap();
    assert_eq!(checked, format!("{pinned}: ok, {} bytes of module", filter.len()));
    fs::write(path("pin"), format!("image={}/pd/filter@sha256:{}\n", registry.address, "1".repeat(64))).unwrap();
    assert!(image(&docker, &["check", &path("pin")]).is_err(), "an image that does not exist");
    fs::write(path("pin"), format!("image={tagged}\n")).unwrap();
    assert!(image(&docker, &["check", &path("pin")]).unwrap_err().contains("name it by digest"));

    for name in [&tagged, &pinned] {
        assert_eq!(image(&docker, &["pull", name, "--module", &path("back.wasm")]).unwrap(), digest);
        assert!(fs::read(path("back.wasm")).unwrap() == filter);
        fs::remove_file(path("back.wasm")).unwrap();
    }
}
