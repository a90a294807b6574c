//! Which model serves a request: aliases of the configuration stand for other models, by weight. Lists of models.

use std::sync::Arc;

use crate::config::{Alias, Config};
use crate::endpoints::candidates::{Candidates, NoCandidates};
use crate::endpoints::table::Table;
use crate::request::head::{RequestHead, Subset, candidates};
use crate::request::reply::{Rejection, Reply};
use crate::time::Monotonic;
use crate::wire::ModelCard;
use crate::workers::worker::Worker;

/// The model that serves a request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Served {
    /// Its name, as endpoints list it.
    pub(crate) model: String,
    pub(crate) candidates: Arc<Candidates>,
    /// The name as a JSON string, where both legs must say another one than the client.
    pub(crate) rewrite: Option<Vec<u8>>,
    /// Whether the response names the model that the client asked for.
    pub(crate) is_put_back: bool,
}

/// The model that serves what a client asks. All requests of a session get the same target of an alias.
///
/// # Errors
/// [`Rejection::UnknownModel`], [`Rejection::NoEndpoint`]
pub(super) fn serving_model(
    worker: &mut Worker,
    head: &RequestHead,
    asked: &str,
    now: Monotonic,
) -> Result<Served, Rejection> {
    let bits = match head.session() {
        _ if !head.config.models.contains_key(asked) => 0,
        Some(id) => xxhash_rust::xxh3::xxh3_64(id),
        None => worker.pair_id(head.request_id(), now),
    };
    resolve_model(&head.config, &worker.state.table, head.subset.as_ref(), asked, bits)
}

/// Finds the model for what a client asks, and its endpoints. An alias goes to one of its targets by their weights among
/// those that are served; equal `bits`, to be spread evenly, go to the same one.
fn resolve_model(
    config: &Config,
    table: &Table,
    subset: Option<&Subset>,
    asked: &str,
    bits: u64,
) -> Result<Served, Rejection> {
    let refused = |none| match none {
        NoCandidates::UnknownModel if !config.names_model(asked) => unknown(config, table, asked),
        NoCandidates::UnknownModel | NoCandidates::NoEndpoint => Rejection::NoEndpoint,
    };
    let (model, is_put_back) = match config.models.get(asked) {
        None => (asked, false),
        Some(alias) => {
            let is_served = |model: &str| candidates(table, model, subset).is_ok();
            (target(alias, is_served, bits).unwrap_or(asked), alias.is_put_back)
        }
    };
    let candidates = candidates(table, model, subset).map_err(refused)?;
    let is_other = model != asked;
    let rewrite = is_other.then(|| serde_json::Value::from(model).to_string().into_bytes());
    Ok(Served { model: model.to_owned(), candidates, rewrite, is_put_back: is_put_back && is_other })
}

/// The target at `bits` of those that are served; the first of all where none is, for its error.
fn target(alias: &Alias, is_served: impl Fn(&str) -> bool, bits: u64) -> Option<&str> {
    let served: Vec<_> = alias.targets.iter().filter(|target| target.weight > 0 && is_served(&target.model)).collect();
    let sum = served.iter().fold(0_u64, |sum, target| sum.saturating_add(u64::from(target.weight)));
    let mut left = bits.checked_rem(sum).unwrap_or(0);
    for target in &served {
        match left.checked_sub(u64::from(target.weight)) {
            Some(rest) => left = rest,
            None => return Some(&target.model),
        }
    }
    alias.targets.first().map(|target| target.model.as_str())
}

fn unknown(config: &Config, table: &Table, asked: &str) -> Rejection {
    Rejection::UnknownModel { model: asked.to_owned(), known: known(config, table) }
}

/// Every model that a client may ask for by name, sorted: those that endpoints list, ready or not, and aliases of them.
pub(crate) fn known(config: &Config, table: &Table) -> Vec<String> {
    let aliases = config.models.iter().filter(|(_, alias)| listed(alias, table).next().is_some());
    let aliases = aliases.map(|(name, _)| name.as_str());
    let mut names: Vec<String> = table.model_names().into_iter().chain(aliases).map(str::to_owned).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// The targets of an alias that endpoints list.
fn listed<'a>(alias: &'a Alias, table: &'a Table) -> impl Iterator<Item = &'a str> {
    let targets = alias.targets.iter().filter(|target| target.weight > 0).map(|target| target.model.as_str());
    targets.filter(|model| table.lists_model(model))
}

/// Reason code of the filter's own lists of models.
pub(super) const MODELS: &str = "models";
/// Path that lists models. The card of one model is below it.
const MODELS_PATH: &[u8] = b"/v1/models";
/// Owner of a model whose engine names none.
const OWNER: &str = "envoy-pd";

/// A question about models.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Question {
    /// All models.
    All,
    /// The model of this name.
    One(String),
}

impl Question {
    /// The question that a path asks, percent-encoding undone and without a query; `None` for another path. Model names may
    /// have slashes.
    pub(super) fn of_path(path: &[u8]) -> Option<Self> {
        match path.strip_prefix(MODELS_PATH)? {
            [] => Some(Self::All),
            [b'/', name @ ..] if !name.is_empty() => Some(Self::One(String::from_utf8_lossy(name).into_owned())),
            _ => None,
        }
    }
}

/// Answers a question about models, where endpoints name theirs: no engine knows them all.
///
/// # Errors
/// [`Rejection::UnknownModel`], [`Rejection::NoEndpoint`]
pub(super) fn tell_models(table: &Table, config: &Config, question: &Question) -> Result<Reply, Rejection> {
    let body = match question {
        Question::All => {
            let data: Vec<_> = known(config, table).iter().map(|name| card(config, table, name)).collect();
            serde_json::json!({"object": "list", "data": data})
        }
        Question::One(name) => {
            let is_listed = |alias| listed(alias, table).next().is_some();
            if !table.lists_model(name) && !config.models.get(name).is_some_and(is_listed) {
                let is_gone = table.card(name).is_some() || config.names_model(name);
                return Err(if is_gone { Rejection::NoEndpoint } else { unknown(config, table, name) });
            }
            card(config, table, name)
        }
    };
    let headers = vec![("content-type", "application/json".to_owned())];
    Ok(Reply { status: 200, headers, body: body.to_string().into_bytes(), reason: MODELS })
}

/// A model as the engines list it. Of an alias: what its targets have in common, and their smallest length.
fn card(config: &Config, table: &Table, name: &str) -> serde_json::Value {
    let of_targets = config.models.get(name).and_then(|alias| {
        let cards = listed(alias, table).filter_map(|model| table.card(model)).cloned();
        cards.reduce(|one, other| ModelCard {
            root: one.root.clone().filter(|root| other.root.as_ref() == Some(root)),
            parent: one.parent.clone().filter(|parent| other.parent.as_ref() == Some(parent)),
            ..one.or(other)
        })
    });
    let card = of_targets.or_else(|| table.card(name).cloned()).unwrap_or_default();
    let mut json = serde_json::json!({
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": card.owned_by.as_deref().unwrap_or(OWNER),
        "root": card.root.as_deref().unwrap_or(name),
        "parent": card.parent,
    });
    if let (Some(object), Some(len)) = (json.as_object_mut(), card.max_model_len) {
        object.insert("max_model_len".to_owned(), len.into());
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alias(targets: &str) -> Alias {
        let config = Config::parse(format!(r#"{{"models":{{"a":{{"targets":{targets}}}}}}}"#).as_bytes()).unwrap();
        config.models["a"].clone()
    }

    #[test]
    fn targets_are_taken_by_weight_among_those_that_are_served() {
        let alias = alias(r#"[{"model":"x","weight":3},{"model":"y"},{"model":"z","weight":0}]"#);
        let picks = |is_served: fn(&str) -> bool| (0..8).map(|bits| target(&alias, is_served, bits).unwrap()).collect();
        let all: Vec<&str> = picks(|_| true);
        assert_eq!(all, ["x", "x", "x", "y", "x", "x", "x", "y"]);
        let some: Vec<&str> = picks(|model| model == "y");
        assert_eq!(some, ["y"; 8]);
        let none: Vec<&str> = picks(|_| false);
        assert_eq!(none, ["x"; 8]);
    }
}
