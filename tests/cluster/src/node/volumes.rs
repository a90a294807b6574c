//! Volumes of a pod as folders.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{
    ConfigMap, DownwardAPIVolumeFile, KeyToPath, Pod, Secret, ServiceAccount, Volume, VolumeProjection,
};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client, ResourceExt as _};

use super::downward::field;

/// Seconds for which a token of a service account is good; nothing here lives longer.
const TOKEN_SECONDS: i64 = 86_400;

/// Writes the volumes under a folder; returns where each is.
///
/// # Errors
/// What is missing.
pub async fn write(client: &Client, pod: &Pod, ip: &str, under: &Path) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let mut folders = BTreeMap::new();
    let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_ref());
    let writer = Writer { client, pod, ip, has_tokens: true };
    for volume in volumes.into_iter().flatten() {
        let folder = under.join(&volume.name);
        fs::create_dir_all(&folder)?;
        writer.volume(volume, &folder).await.with_context(|| format!("volume {}", volume.name))?;
        folders.insert(volume.name.clone(), folder);
    }
    Ok(folders)
}

/// Writes the config maps and secrets of the volumes once more, which may have changed: a running pod sees it in its files,
/// as the kubelet has it. Keys that are gone stay, and tokens of service accounts last.
///
/// # Errors
/// What is missing.
pub async fn refresh(client: &Client, pod: &Pod, ip: &str, under: &Path) -> anyhow::Result<()> {
    let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_ref());
    let writer = Writer { client, pod, ip, has_tokens: false };
    for volume in volumes.into_iter().flatten() {
        writer.volume(volume, &under.join(&volume.name)).await.with_context(|| format!("volume {}", volume.name))?;
    }
    Ok(())
}

struct Writer<'a> {
    client: &'a Client,
    pod: &'a Pod,
    ip: &'a str,
    has_tokens: bool,
}

impl Writer<'_> {
    async fn volume(&self, volume: &Volume, folder: &Path) -> anyhow::Result<()> {
        if let Some(of) = &volume.config_map {
            self.config_map(&of.name, of.items.as_deref(), of.optional, folder).await
        } else if let Some(of) = &volume.secret {
            let name = of.secret_name.as_deref().unwrap_or_default();
            self.secret(name, of.items.as_deref(), of.optional, folder).await
        } else if let Some(of) = &volume.projected {
            for source in of.sources.iter().flatten() {
                self.projection(source, folder).await?;
            }
            Ok(())
        } else if let Some(of) = &volume.downward_api {
            self.downward(of.items.as_deref().unwrap_or_default(), folder)
        } else if volume.empty_dir.is_some() {
            Ok(())
        } else {
            bail!("this node knows config maps, secrets, projections and empty folders")
        }
    }

    async fn projection(&self, source: &VolumeProjection, folder: &Path) -> anyhow::Result<()> {
        if let Some(of) = &source.config_map {
            self.config_map(&of.name, of.items.as_deref(), of.optional, folder).await?;
        }
        if let Some(of) = &source.secret {
            self.secret(&of.name, of.items.as_deref(), of.optional, folder).await?;
        }
        if let Some(of) = &source.downward_api {
            self.downward(of.items.as_deref().unwrap_or_default(), folder)?;
        }
        if let Some(of) = source.service_account_token.as_ref().filter(|_| self.has_tokens) {
            let account = self.pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref());
            let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &self.namespace());
            let request = TokenRequest {
                metadata: ObjectMeta::default(),
                spec: TokenRequestSpec {
                    audiences: of.audience.iter().cloned().collect(),
                    expiration_seconds: Some(TOKEN_SECONDS),
                    bound_object_ref: None,
                },
                status: None,
            };
            let name = account.unwrap_or("default");
            let made = accounts.create_token_request(name, &PostParams::default(), &request).await?;
            put(folder, &of.path, made.status.context("no token")?.token.as_bytes())?;
        }
        Ok(())
    }

    async fn config_map(
        &self,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
        folder: &Path,
    ) -> anyhow::Result<()> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace());
        let Some(map) = maps.get_opt(name).await? else { return missing("config map", name, optional) };
        let text = map.data.unwrap_or_default().into_iter().map(|(key, text)| (key, text.into_bytes()));
        let bytes = map.binary_data.unwrap_or_default().into_iter().map(|(key, bytes)| (key, bytes.0));
        put_all(&text.chain(bytes).collect(), items, folder)
    }

    async fn secret(
        &self,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
        folder: &Path,
    ) -> anyhow::Result<()> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace());
        let Some(secret) = secrets.get_opt(name).await? else { return missing("secret", name, optional) };
        let data = secret.data.unwrap_or_default().into_iter().map(|(key, bytes)| (key, bytes.0)).collect();
        put_all(&data, items, folder)
    }

    fn downward(&self, items: &[DownwardAPIVolumeFile], folder: &Path) -> anyhow::Result<()> {
        for item in items {
            let path = item.field_ref.as_ref().map(|field| field.field_path.as_str()).unwrap_or_default();
            put(folder, &item.path, field(self.pod, self.ip, path).as_bytes())?;
        }
        Ok(())
    }

    fn namespace(&self) -> String {
        self.pod.namespace().unwrap_or_default()
    }
}

fn missing(kind: &str, name: &str, optional: Option<bool>) -> anyhow::Result<()> {
    if optional == Some(true) { Ok(()) } else { bail!("there is no {kind} {name}") }
}

fn put_all(data: &BTreeMap<String, Vec<u8>>, items: Option<&[KeyToPath]>, folder: &Path) -> anyhow::Result<()> {
    match items {
        Some(items) => items.iter().try_for_each(|item| {
            let bytes = data.get(&item.key).with_context(|| format!("there is no key {}", item.key))?;
            put(folder, &item.path, bytes)
        }),
        None => data.iter().try_for_each(|(key, bytes)| put(folder, key, bytes)),
    }
}

fn put(folder: &Path, path: &str, bytes: &[u8]) -> anyhow::Result<()> {
    let path = folder.join(path);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    if fs::read(&path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    // Nobody reads half a file.
    let mut new = path.clone().into_os_string();
    new.push(".new");
    fs::write(&new, bytes).and_then(|()| fs::rename(&new, &path)).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_as_a_whole_and_only_when_it_differs() {
        use std::os::unix::fs::MetadataExt as _;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/key");
        let number = |bytes: &[u8]| {
            put(folder.path(), "a/key", bytes).unwrap();
            assert_eq!(fs::read(&path).unwrap(), bytes);
            fs::metadata(&path).unwrap().ino()
        };
        let first = number(b"1");
        assert_eq!(number(b"1"), first);
        assert_ne!(number(b"22"), first);
        assert_eq!(fs::read_dir(folder.path().join("a")).unwrap().count(), 1, "nothing else is left");
    }
}
