//! Warns of valid lists that cannot serve.

use std::collections::{BTreeMap, BTreeSet};

use pd_core::wire::{Endpoint, Engine, Role, State};

/// One line for each reason why endpoints of a list serve nothing; empty when every endpoint is of use. Only ready
/// endpoints count.
///
/// `engine_of` returns the engine of an endpoint; `None` when the pool's policy decides, which an endpoints file does
/// not have. Warnings about engines then are left out.
pub(super) fn warnings(endpoints: &[Endpoint], engine_of: impl Fn(&Endpoint) -> Option<Engine>) -> Vec<String> {
    if endpoints.is_empty() {
        return vec!["the list has no endpoint: every request gets 503".to_owned()];
    }
    let ready: Vec<&Endpoint> = endpoints.iter().filter(|endpoint| endpoint.state == State::Ready).collect();
    if ready.is_empty() {
        return vec!["no endpoint is ready: every request gets 503".to_owned()];
    }
    let mut pools: BTreeMap<&str, Vec<Member<'_>>> = BTreeMap::new();
    for endpoint in ready {
        let engine = engine_of(endpoint);
        pools.entry(&endpoint.pool).or_default().push(Member { endpoint, engine });
    }
    pools.into_iter().flat_map(|(pool, members)| pool_warnings(pool, &members)).collect()
}

/// A ready endpoint of a pool.
#[derive(Clone, Copy)]
struct Member<'a> {
    endpoint: &'a Endpoint,
    engine: Option<Engine>,
}

impl Member<'_> {
    fn has(self, role: Role) -> bool {
        self.endpoint.role == role
    }

    fn has_revision_of(self, other: &Self) -> bool {
        self.endpoint.revision == other.endpoint.revision
    }

    /// The revision, as the subject of a sentence.
    fn revision(self) -> String {
        let revision = self.endpoint.revision.as_ref();
        revision.map_or_else(|| "the rest without a revision".to_owned(), |revision| format!("revision {revision:?}"))
    }

    /// Whether it serves a model, by name or as every model of its pool.
    fn serves(self, model: &str) -> bool {
        self.endpoint.models.is_empty() || self.endpoint.models.iter().any(|known| known == model)
    }
}

fn pool_warnings(pool: &str, members: &[Member<'_>]) -> Vec<String> {
    if let Some(what) = role_warning(members, "every request gets 503") {
        return vec![format!("pool {pool:?} has {what}")];
    }
    let models: BTreeSet<&str> = members.iter().flat_map(|it| &it.endpoint.models).map(String::as_str).collect();
    let mut lines = Vec::new();
    for model in models {
        let of_model: Vec<_> = members.iter().copied().filter(|member| member.serves(model)).collect();
        if let Some(what) = role_warning(&of_model, "its requests get 503") {
            lines.push(format!("pool {pool:?}: model {model:?} has {what}"));
        }
    }
    lines.extend(
        members.iter().filter_map(|member| pair_warning(*member, members)).map(|what| format!("pool {pool:?}: {what}")),
    );
    lines
}

/// What is missing when all endpoints have one role.
fn role_warning(members: &[Member<'_>], outcome: &str) -> Option<String> {
    let all_have = |role| members.iter().all(|member| member.has(role));
    if all_have(Role::Prefill) {
        return Some(format!("prefill endpoints only: nothing generates, {outcome}"));
    }
    let engine = members.first().and_then(|member| member.engine)?;
    let is_needy = members.iter().all(|member| member.engine.is_some_and(|engine| !engine.protocol().decodes_alone));
    (all_have(Role::Decode) && is_needy).then(|| {
        format!("decode endpoints only, and {}'s serve no request without a prefill endpoint", engine_name(engine))
    })
}

/// Why an endpoint has no partner for its leg.
fn pair_warning(member: Member<'_>, members: &[Member<'_>]) -> Option<String> {
    let id = member.endpoint.id();
    let group = member.endpoint.group.as_ref();
    match member.endpoint.role {
        Role::Both => None,
        Role::Prefill => {
            let decode: Vec<_> = members.iter().filter(|it| it.has(Role::Decode)).collect();
            if decode.is_empty() {
                return Some(format!("there is no decode endpoint, so prefill endpoint {id} is never used"));
            }
            let partners: Vec<_> = decode.into_iter().filter(|it| pairs_by_group(&member, it)).collect();
            if let (Some(group), true) = (group, partners.is_empty()) {
                return Some(format!("group {group:?} has no decode endpoint, so prefill endpoint {id} is never used"));
            }
            let partners: Vec<_> = partners.into_iter().filter(|it| it.has_revision_of(&member)).collect();
            if partners.is_empty() {
                let revision = member.revision();
                return Some(format!("{revision} has no decode endpoint, so prefill endpoint {id} is never used"));
            }
            let engine = mismatch(member, &partners)?;
            Some(format!(
                "prefill endpoint {id} speaks {engine}, which no decode endpoint speaks: nothing takes its prompts over"
            ))
        }
        Role::Decode => {
            let prefill: Vec<_> = members.iter().filter(|it| it.has(Role::Prefill)).collect();
            let needs_prefill = member.engine.is_some_and(|engine| !engine.protocol().decodes_alone);
            if prefill.is_empty() {
                return needs_prefill
                    .then(|| format!("there is no prefill endpoint, so decode endpoint {id} is never used"));
            }
            let partners: Vec<_> = prefill.into_iter().filter(|it| pairs_by_group(it, &member)).collect();
            if partners.is_empty() {
                return Some(match group {
                    Some(group) => {
                        format!("group {group:?} has no prefill endpoint, so decode endpoint {id} takes no prompt over")
                    }
                    None => format!(
                        "every prefill endpoint has a group, so decode endpoint {id}, which has none, takes no prompt over"
                    ),
                });
            }
            let partners: Vec<_> = partners.into_iter().filter(|it| it.has_revision_of(&member)).collect();
            if partners.is_empty() {
                let revision = member.revision();
                return Some(format!(
                    "{revision} has no prefill endpoint, so decode endpoint {id} takes no prompt over"
                ));
            }
            let engine = mismatch(member, &partners)?;
            Some(format!(
                "decode endpoint {id} speaks {engine}, which no prefill endpoint speaks: it takes no prompt over"
            ))
        }
    }
}

/// Whether groups let two endpoints pair. A prefill endpoint without a group pairs with any decode endpoint.
fn pairs_by_group(prefill: &Member<'_>, decode: &Member<'_>) -> bool {
    prefill.endpoint.group.is_none() || prefill.endpoint.group == decode.endpoint.group
}

/// The engine of an endpoint when all of its partners have another one; `None` when an engine is unknown.
fn mismatch(member: Member<'_>, partners: &[&Member<'_>]) -> Option<String> {
    let engine = member.engine?;
    partners.iter().all(|it| it.engine.is_some_and(|other| other != engine)).then(|| engine_name(engine))
}

/// An engine as endpoints files write it.
fn engine_name(engine: Engine) -> String {
    serde_json::to_value(engine).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}
