//! The image in a registry.

use anyhow::{Context as _, bail};
use docker_credential::{CredentialRetrievalError, DockerCredential};
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};

use crate::manifest::{Blob, INDEX, Image, MANIFEST, Manifest, digest};

/// A name in a registry, and how to speak to it.
pub struct Registry {
    client: Client,
    auth: RegistryAuth,
    reference: Reference,
}

impl Registry {
    /// Reads credentials from the usual Docker configuration (`$DOCKER_CONFIG` or `~/.docker`, with its helpers).
    /// A registry on this machine is spoken to in plain HTTP, as Docker does, and others where asked.
    ///
    /// # Errors
    /// One line when the name is none or the configuration is broken.
    pub fn new(name: &str, is_plain: bool) -> anyhow::Result<Self> {
        let reference: Reference = name.parse().with_context(|| format!("{name} is no image"))?;
        let server = reference.resolve_registry();
        let auth = match docker_credential::get_credential(server) {
            Ok(DockerCredential::UsernamePassword(user, password)) => RegistryAuth::Basic(user, password),
            Ok(DockerCredential::IdentityToken(token)) => RegistryAuth::Bearer(token),
            Err(
                CredentialRetrievalError::ConfigNotFound
                | CredentialRetrievalError::ConfigReadError
                | CredentialRetrievalError::NoCredentialConfigured,
            ) => RegistryAuth::Anonymous,
            Err(error) => bail!("credentials for {server}: {error}"),
        };
        let host = server.rsplit_once(':').map_or(server, |(host, _)| host);
        let is_here = host == "localhost" || host.starts_with("127.");
        let protocol = if is_plain || is_here { ClientProtocol::Http } else { ClientProtocol::Https };
        // Another provider would only stand there already if this is called again.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::new(ClientConfig { protocol, ..ClientConfig::default() });
        Ok(Self { client, auth, reference })
    }

    /// Pushes what is missing, and the manifest byte for byte; returns the name by digest.
    ///
    /// # Errors
    /// One line when the registry refuses.
    pub async fn push(&self, image: &Image) -> anyhow::Result<String> {
        let (client, reference) = (&self.client, &self.reference);
        client.auth(reference, &self.auth, RegistryOperation::Push).await?;
        for blob in [&image.config, &image.layer] {
            if !client.blob_exists(reference, &blob.digest).await.unwrap_or(false) {
                client.push_blob(reference, blob.bytes.clone(), &blob.digest).await?;
            }
        }
        let kind = MANIFEST.parse().context("media type")?;
        client.push_manifest_raw(reference, image.manifest.bytes.clone(), kind).await?;
        let by_digest = reference.clone_with_digest(image.manifest.digest.clone());
        Ok(format!("{}/{}@{}", by_digest.registry(), by_digest.repository(), image.manifest.digest))
    }

    /// Pushes the index of images that are there, byte for byte; returns the name by digest.
    ///
    /// # Errors
    /// One line when the registry refuses, such as for an image that is not there.
    pub async fn push_index(&self, bytes: Vec<u8>) -> anyhow::Result<String> {
        let (client, reference) = (&self.client, &self.reference);
        client.auth(reference, &self.auth, RegistryOperation::Push).await?;
        let index = Blob::new(bytes);
        client.push_manifest_raw(reference, index.bytes, INDEX.parse().context("media type")?).await?;
        Ok(format!("{}/{}@{}", reference.registry(), reference.repository(), index.digest))
    }

    /// Pulls an image and checks every digest.
    ///
    /// # Errors
    /// One line when it is not there or not of one layer.
    pub async fn pull(&self) -> anyhow::Result<Image> {
        let (client, reference) = (&self.client, &self.reference);
        client.auth(reference, &self.auth, RegistryOperation::Pull).await?;
        let (bytes, _) = client.pull_manifest_raw(reference, &self.auth, &[MANIFEST]).await?;
        let manifest = Blob::new(bytes.to_vec());
        if reference.digest().is_some_and(|asked| asked != manifest.digest) {
            bail!("the registry's manifest is {}", manifest.digest);
        }
        let names: Manifest = serde_json::from_slice(&manifest.bytes).context("the manifest is broken")?;
        let [layer] = names.layers.as_slice() else { bail!("the image must have one layer") };
        Ok(Image { config: self.blob(&names.config).await?, layer: self.blob(layer).await?, manifest })
    }

    async fn blob(&self, of: &crate::manifest::Descriptor) -> anyhow::Result<Blob> {
        let mut bytes = Vec::new();
        let descriptor = OciDescriptor {
            media_type: of.media_type.clone(),
            digest: of.digest.clone(),
            size: i64::try_from(of.size)?,
            ..OciDescriptor::default()
        };
        self.client.pull_blob(&self.reference, &descriptor, &mut bytes).await?;
        if digest(&bytes) != of.digest {
            bail!("the registry's {} is something else", of.digest);
        }
        Ok(Blob { digest: of.digest.clone(), bytes })
    }
}
