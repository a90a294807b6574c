//! Environment variables of a container.

use std::collections::BTreeMap;

use anyhow::bail;
use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVar, Pod, Secret};
use kube::{Api, ResourceExt as _};

use super::container::expand;
use super::downward::field;
use super::shared::Shared;
use crate::network::KUBERNETES;

/// The environment variables of a container.
///
/// # Errors
/// Which Secret or ConfigMap key is missing.
pub(super) async fn variables(
    shared: &Shared,
    pod: &Pod,
    ip: &str,
    container: &Container,
) -> anyhow::Result<BTreeMap<String, String>> {
    let mut variables: BTreeMap<String, String> = [
        ("KUBERNETES_SERVICE_HOST".to_owned(), KUBERNETES.to_string()),
        ("KUBERNETES_SERVICE_PORT".to_owned(), "443".to_owned()),
        ("HOSTNAME".to_owned(), pod.name_any()),
    ]
    .into();
    for variable in container.env.iter().flatten() {
        if let Some(value) = value(shared, pod, ip, variable, &variables).await? {
            variables.insert(variable.name.clone(), value);
        }
    }
    Ok(variables)
}

async fn value(
    shared: &Shared,
    pod: &Pod,
    ip: &str,
    variable: &EnvVar,
    known: &BTreeMap<String, String>,
) -> anyhow::Result<Option<String>> {
    let namespace = pod.namespace().unwrap_or_default();
    let Some(from) = &variable.value_from else {
        return Ok(Some(expand(variable.value.as_deref().unwrap_or_default(), known)));
    };
    if let Some(of) = &from.field_ref {
        return Ok(Some(field(pod, ip, &of.field_path)));
    }
    let (found, optional, what) = if let Some(of) = &from.secret_key_ref {
        let secrets: Api<Secret> = Api::namespaced(shared.client.clone(), &namespace);
        let data = secrets.get_opt(&of.name).await?.and_then(|secret| secret.data?.remove(&of.key));
        let text = data.map(|bytes| String::from_utf8(bytes.0)).transpose()?;
        (text, of.optional, format!("key {} of secret {}", of.key, of.name))
    } else if let Some(of) = &from.config_map_key_ref {
        let maps: Api<ConfigMap> = Api::namespaced(shared.client.clone(), &namespace);
        let text = maps.get_opt(&of.name).await?.and_then(|map| map.data?.remove(&of.key));
        (text, of.optional, format!("key {} of config map {}", of.key, of.name))
    } else {
        // Resources of the container: there are no limits here.
        return Ok(None);
    };
    if found.is_none() && optional != Some(true) {
        bail!("there is no {what} for {}", variable.name);
    }
    Ok(found)
}
