//! Bytes of the image: layer, configuration, manifest.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use flate2::read::GzDecoder;
use flate2::{Compression, GzBuilder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::elf;

/// Media type of the manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an index of images, one for each architecture.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of the configuration.
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of the layer; Envoy Gateway takes no other.
pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Name under which Envoy Gateway looks for the module.
const MODULE: &str = "plugin.wasm";
/// User and group of a program's image.
const NOBODY: &str = "65532:65532";
/// Bytes that a module may have; Envoy Gateway's own limit.
const MAX_MODULE_BYTES: u64 = 256 << 20;

/// Something content-addressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    /// `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// Content.
    pub bytes: Vec<u8>,
}

/// An image: one manifest and the blobs that it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Manifest, whose digest is the image's.
    pub manifest: Blob,
    /// Configuration.
    pub config: Blob,
    /// The only layer.
    pub layer: Blob,
}

/// What a manifest says of a blob.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Media type.
    pub media_type: String,
    /// `sha256:…`
    pub digest: String,
    /// Bytes.
    pub size: u64,
}

/// The part of a manifest that is read here.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Configuration.
    pub config: Descriptor,
    /// Layers.
    pub layers: Vec<Descriptor>,
}

impl Blob {
    /// Computes the digest.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { digest: digest(&bytes), bytes }
    }

    fn describe(&self, media_type: &str) -> serde_json::Value {
        json!({"mediaType": media_type, "digest": self.digest, "size": self.bytes.len()})
    }
}

impl Image {
    /// Makes the image of a module.
    ///
    /// # Errors
    /// One line when these bytes are no module.
    pub fn new(module: &[u8]) -> anyhow::Result<Self> {
        if !module.starts_with(b"\0asm") {
            bail!("this is no WebAssembly module");
        }
        let platform = json!({"architecture": "wasm", "os": "wasip1", "config": {}});
        Self::of_file(MODULE, 0o644, module, platform, "envoy-pd filter")
    }

    /// Makes the image of a Linux program that needs no other file, to run as a user that is nobody.
    ///
    /// # Errors
    /// One line when these bytes are no such program.
    pub fn of_program(name: &str, program: &[u8]) -> anyhow::Result<Self> {
        let platform = json!({
            "architecture": elf::of_static(program)?,
            "os": "linux",
            "config": {"Entrypoint": [format!("/{name}")], "User": NOBODY, "WorkingDir": "/"},
        });
        Self::of_file(name, 0o755, program, platform, name)
    }

    /// `config` lacks the layers' digests.
    fn of_file(name: &str, mode: u32, bytes: &[u8], mut config: Value, title: &str) -> anyhow::Result<Self> {
        let tar = archive(name, mode, bytes)?;
        // The diff id is that of the archive before compression.
        config["rootfs"] = json!({"type": "layers", "diff_ids": [digest(&tar)]});
        let mut gzip = GzBuilder::new().mtime(0).operating_system(255).write(Vec::new(), Compression::best());
        gzip.write_all(&tar)?;
        let layer = Blob::new(gzip.finish()?);
        let config = Blob::new(serde_json::to_vec(&config)?);
        let manifest = Blob::new(serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.describe(CONFIG),
            "layers": [layer.describe(LAYER)],
            "annotations": {
                "org.opencontainers.image.title": title,
                "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
                "org.opencontainers.image.licenses": env!("CARGO_PKG_LICENSE"),
                "org.opencontainers.image.source": env!("CARGO_PKG_REPOSITORY"),
            },
        }))?);
        Ok(Self { manifest, config, layer })
    }

    /// The module in the image, found as Envoy Gateway finds it.
    ///
    /// # Errors
    /// One line when Envoy Gateway would refuse the image.
    pub fn module(&self) -> anyhow::Result<Vec<u8>> {
        let manifest: Manifest = serde_json::from_slice(&self.manifest.bytes).context("the manifest is broken")?;
        let last = manifest.layers.last().context("the image has no layer")?;
        if last.media_type != LAYER {
            bail!("the last layer is {}, not {LAYER}", last.media_type);
        }
        let mut archive = tar::Archive::new(GzDecoder::new(self.layer.bytes.as_slice()).take(MAX_MODULE_BYTES));
        for entry in archive.entries()? {
            let mut entry = entry?;
            if entry.path()?.file_name().is_some_and(|name| name == MODULE) {
                let mut module = Vec::new();
                entry.read_to_end(&mut module)?;
                return Ok(module);
            }
        }
        bail!("there is no {MODULE} in the last layer")
    }

    /// Writes the files of a program's image under a folder and returns where its program is.
    ///
    /// # Errors
    /// One line when the image has no entry point or a file cannot be written.
    pub fn unpack(&self, folder: &Path) -> anyhow::Result<PathBuf> {
        let config: Value = serde_json::from_slice(&self.config.bytes).context("the configuration is broken")?;
        let program = config["config"]["Entrypoint"][0].as_str().context("the image has no entry point")?;
        tar::Archive::new(GzDecoder::new(self.layer.bytes.as_slice())).unpack(folder)?;
        Ok(folder.join(program.trim_start_matches('/')))
    }
}

/// `sha256:` and the hexadecimal digest.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{:x}", Sha256::digest(bytes))
}

fn archive(name: &str, mode: u32, bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut header = tar::Header::new_ustar();
    header.set_size(bytes.len() as u64);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_data(&mut header, name, bytes)?;
    Ok(builder.into_inner()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &[u8] = b"\0asm\x01\0\0\0";

    #[test]
    fn the_same_module_makes_the_same_image() {
        // Written down, so that another machine, toolchain or version of a library that makes other bytes is seen.
        let digest = Image::new(EMPTY).unwrap().manifest.digest;
        assert_eq!(digest, "sha256:2baeb884783ca44b48ebe661b57d1c10286c3901923455e65fe74f4f869be87a");
    }

    #[test]
    fn another_module_makes_another_image() {
        let other = Image::new(&[EMPTY, b"\0"].concat()).unwrap();
        assert_ne!(other.manifest.digest, Image::new(EMPTY).unwrap().manifest.digest);
    }

    #[test]
    fn the_module_comes_out_as_it_went_in() {
        assert_eq!(Image::new(EMPTY).unwrap().module().unwrap(), EMPTY);
    }

    #[test]
    fn a_program_comes_out_as_it_went_in() {
        let program = elf::tests::program(1);
        let image = Image::of_program("run", &program).unwrap();
        assert_eq!(image, Image::of_program("run", &program).unwrap());
        let config: Value = serde_json::from_slice(&image.config.bytes).unwrap();
        assert_eq!((&config["os"], &config["architecture"]), (&json!("linux"), &json!("amd64")));
        let folder = tempfile::tempdir().unwrap();
        let path = image.unpack(folder.path()).unwrap();
        assert_eq!(path, folder.path().join("run"));
        assert_eq!(std::fs::read(&path).unwrap(), program);
        assert!(Image::new(EMPTY).unwrap().unpack(folder.path()).is_err(), "a module is no program");
    }

    #[test]
    fn what_envoy_gateway_would_refuse_is_refused() {
        assert_eq!(Image::new(b"MZ").unwrap_err().to_string(), "this is no WebAssembly module");
        let mut image = Image::new(EMPTY).unwrap();
        let text = String::from_utf8(image.manifest.bytes).unwrap().replace(LAYER, "application/wasm");
        image.manifest.bytes = text.into_bytes();
        assert!(image.module().unwrap_err().to_string().starts_with("the last layer is application/wasm"));
    }
}
