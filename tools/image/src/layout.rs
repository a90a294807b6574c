//! The image as files: an OCI image layout, which other tools read too.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail};
use serde::Deserialize;
use serde_json::json;

use crate::manifest::{Blob, Descriptor, Image, MANIFEST, Manifest, digest};

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

/// Writes the layout in place of what is there.
///
/// # Errors
/// One line when a file cannot be written.
pub fn write(image: &Image, directory: &Path) -> anyhow::Result<()> {
    let blobs = directory.join("blobs/sha256");
    if blobs.exists() {
        fs::remove_dir_all(&blobs).with_context(|| blobs.display().to_string())?;
    }
    fs::create_dir_all(&blobs).with_context(|| blobs.display().to_string())?;
    for blob in [&image.manifest, &image.config, &image.layer] {
        fs::write(blobs.join(hex(&blob.digest)?), &blob.bytes)?;
    }
    fs::write(directory.join("oci-layout"), json!({"imageLayoutVersion": "1.0.0"}).to_string())?;
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{"mediaType": MANIFEST, "digest": image.manifest.digest, "size": image.manifest.bytes.len()}],
    });
    fs::write(directory.join("index.json"), index.to_string())?;
    Ok(())
}

/// Reads a layout and checks every digest.
///
/// # Errors
/// One line when a file is missing or is not what its name says.
pub fn read(directory: &Path) -> anyhow::Result<Image> {
    let index = directory.join("index.json");
    let bytes = fs::read(&index).with_context(|| index.display().to_string())?;
    let index: Index = serde_json::from_slice(&bytes).context("index.json is broken")?;
    let [of_manifest] = index.manifests.as_slice() else { bail!("the layout must hold one image") };
    let manifest = blob(directory, &of_manifest.digest)?;
    let names: Manifest = serde_json::from_slice(&manifest.bytes).context("the manifest is broken")?;
    let [of_layer] = names.layers.as_slice() else { bail!("the image must have one layer") };
    let (config, layer) = (blob(directory, &names.config.digest)?, blob(directory, &of_layer.digest)?);
    Ok(Image { manifest, config, layer })
}

fn blob(directory: &Path, name: &str) -> anyhow::Result<Blob> {
    let path = directory.join("blobs/sha256").join(hex(name)?);
    let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
    if digest(&bytes) != name {
        bail!("{} is not what its name says", path.display());
    }
    Ok(Blob { digest: name.to_owned(), bytes })
}

fn hex(name: &str) -> anyhow::Result<&str> {
    name.strip_prefix("sha256:")
        .filter(|hex| hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .with_context(|| format!("{name} is no sha256 digest"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &[u8] = b"\0asm\x01\0\0\0";

    #[test]
    fn what_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let image = Image::new(EMPTY).unwrap();
        write(&Image::new(&[EMPTY, b"\0"].concat()).unwrap(), directory.path()).unwrap();
        write(&image, directory.path()).unwrap();
        assert_eq!(read(directory.path()).unwrap(), image);
        assert_eq!(fs::read_dir(directory.path().join("blobs/sha256")).unwrap().count(), 3);
    }

    #[test]
    fn an_altered_blob_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let image = Image::new(EMPTY).unwrap();
        write(&image, directory.path()).unwrap();
        fs::write(directory.path().join("blobs/sha256").join(hex(&image.layer.digest).unwrap()), "x").unwrap();
        assert!(read(directory.path()).unwrap_err().to_string().ends_with("is not what its name says"));
    }
}
