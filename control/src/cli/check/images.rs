//! Digests and versions of images.

use crate::cli::manifests::{Manifests, text};

/// The sha256 digest of an image's name; `None` when it has none or an incomplete one.
pub(super) fn digest(image: &str) -> Option<&str> {
    let (_, digest) = image.split_once("@sha256:")?;
    (digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(digest)
}

/// The version of an image, from the ConfigMap that names the image.
pub(super) fn version<'a>(manifests: &'a Manifests, image: &str) -> Option<&'a str> {
    let of_image = manifests.of_kind("ConfigMap").filter(|map| text(&map.value, "/data/image") == image);
    of_image.map(|map| text(&map.value, "/data/version")).find(|version| !version.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_digest_is_one() {
        assert!(digest(&format!("r.example/f@sha256:{}", "0".repeat(64))).is_some());
        assert!(digest("r.example/f:0.1.0").is_none() && digest("r.example/f@sha256:00").is_none());
    }
}
