//! Which model serves a request: aliases of the configuration stand for other models, by weight. Lists of models.

use std::sync::Arc;

use crate::config::Config;
use crate::endpoints::candidates::{Candidates, NoCandidates};
use crate::endpoints::table::Table;
use crate::request::head::{RequestHead, Subset, candidates};
use crate::request::reply::{Rejection, Reply};
use crate::time::Monotonic;
use crate::wire::{ModelCard, Stated, Target};
use crate::workers::worker::Worker;

/// The model that serves a request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Served {
    /// Its name, as endpoints list it.
    pub(crate) model: String,
    pub(crate) candidates: Arc<Candidates>,
    /// The name as a JSON string, if the legs' bodies must name another model than the client's body.
    pub(crate) rewrite: Option<Vec<u8>>,
    /// Whether the response names the model that the client asked for.
    pub(crate) is_put_back: bool,
}

/// The model that serves the model name `asked` of a client. All requests of a session get the same target of an alias.
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
        _ if alias(&head.config, worker.state.table.stated(), asked).is_none() => 0,
        Some(id) => xxhash_rust::xxh3::xxh3_64(id),
        None => worker.pair_id(head.request_id(), now),
    };
    resolve_model(&head.config, &worker.state.table, head.subset.as_ref(), asked, bits)
}

/// Targets of an alias, and whether answers name the alias. An alias of the configuration counts before one that the
/// cluster states. `None` for a name that is no alias.
pub(super) fn alias<'a>(config: &'a Config, stated: &'a Stated, asked: &str) -> Option<(&'a [Target], bool)> {
    let configured = config.models.get(asked).map(|alias| (alias.targets.as_slice(), alias.is_put_back));
    configured.or_else(|| Some((stated.targets(asked)?, false)))
}

/// Whether the configuration or the cluster names a model.
fn is_named(config: &Config, stated: &Stated, name: &str) -> bool {
    config.names_model(name) || stated.names_model(name)
}

/// Finds the model for the model name of a client, and its endpoints. An alias gets one of the targets that endpoints
/// serve, by their weights. `bits` should be evenly spread; equal `bits` give the same target.
fn resolve_model(
    config: &Config,
    table: &Table,
    subset: Option<&Subset>,
    asked: &str,
    bits: u64,
) -> Result<Served, Rejection> {
    let refused = |none| match none {
        NoCandidates::UnknownModel if !is_named(config, table.stated(), asked) => unknown(config, table, asked),
        NoCandidates::UnknownModel | NoCandidates::NoEndpoint => Rejection::NoEndpoint,
    };
    let (model, is_put_back) = match alias(config, table.stated(), asked) {
        None => (asked, false),
        Some((targets, is_put_back)) => {
            let is_served = |model: &str| candidates(table, model, subset).is_ok();
            (target(targets, is_served, bits).unwrap_or(asked), is_put_back)
        }
    };
    let candidates = candidates(table, model, subset).map_err(refused)?;
    let is_other = model != asked;
    let rewrite = is_other.then(|| serde_json::Value::from(model).to_string().into_bytes());
    Ok(Served { model: model.to_owned(), candidates, rewrite, is_put_back: is_put_back && is_other })
}

/// The target at `bits` of those that are served; the first of all where none is, for its error.
fn target(targets: &[Target], is_served: impl Fn(&str) -> bool, bits: u64) -> Option<&str> {
    let served: Vec<_> = targets.iter().filter(|target| target.weight > 0 && is_served(&target.model)).collect();
    let sum = served.iter().fold(0_u64, |sum, target| sum.saturating_add(u64::from(target.weight)));
    let mut left = bits.checked_rem(sum).unwrap_or(0);
    for target in &served {
        match left.checked_sub(u64::from(target.weight)) {
            Some(rest) => left = rest,
            None => return Some(&target.model),
        }
    }
    targets.first().map(|target| target.model.as_str())
}

fn unknown(config: &Config, table: &Table, asked: &str) -> Rejection {
    Rejection::UnknownModel { model: asked.to_owned(), known: known(config, table) }
}

/// Every model that a client may ask for by name, sorted: those that endpoints list, ready or not, and aliases of them.
pub(crate) fn known(config: &Config, table: &Table) -> Vec<String> {
    let configured = config.models.iter().map(|(name, alias)| (name, &alias.targets));
    let aliases =
        configured.chain(&table.stated().aliases).filter(|(_, targets)| listed(targets, table).next().is_some());
    let aliases = aliases.map(|(name, _)| name.as_str());
    let mut names: Vec<String> = table.model_names().into_iter().chain(aliases).map(str::to_owned).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// The targets of an alias that endpoints list.
fn listed<'a>(targets: &'a [Target], table: &'a Table) -> impl Iterator<Item = &'a str> {
    let targets = targets.iter().filter(|target| target.weight > 0).map(|target| target.model.as_str());
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
            let stated = table.stated();
            let is_listed = |(targets, _): (&[Target], _)| listed(targets, table).next().is_some();
            if !table.lists_model(name) && !alias(config, stated, name).is_some_and(is_listed) {
                let is_gone = table.card(name).is_some() || is_named(config, stated, name);
                return Err(if is_gone { Rejection::NoEndpoint } else { unknown(config, table, name) });
            }
            card(config, table, name)
        }
    };
    let headers = vec![("content-type", "application/json".to_owned())];
    Ok(Reply { status: 200, headers, body: body.to_string().into_bytes(), reason: MODELS })
}

/// A model's card, as the engines list it. An alias has the common members of its targets' cards, and their smallest length.
fn card(config: &Config, table: &Table, name: &str) -> serde_json::Value {
    let of_targets = alias(config, table.stated(), name).and_then(|(targets, _)| {
        let cards = listed(targets, table).filter_map(|model| table.card(model)).cloned();
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

    fn targets(text: &str) -> Vec<Target> {
        let config = Config::parse(format!(r#"{{"models":{{"a":{{"targets":{text}}}}}}}"#).as_bytes()).unwrap();
        config.models["a"].targets.clone()
    }

    #[test]
    fn targets_are_taken_by_weight_among_those_that_are_served() {
        let targets = targets(r#"[{"model":"x","weight":3},{"model":"y"},{"model":"z","weight":0}]"#);
        let picks =
            |is_served: fn(&str) -> bool| (0..8).map(|bits| target(&targets, is_served, bits).unwrap()).collect();
        let all: Vec<&str> = picks(|_| true);
        assert_eq!(all, ["x", "x", "x", "y", "x", "x", "x", "y"]);
        let some: Vec<&str> = picks(|model| model == "y");
        assert_eq!(some, ["y"; 8]);
        let none: Vec<&str> = picks(|_| false);
        assert_eq!(none, ["x"; 8]);
    }

    #[test]
    fn the_configuration_comes_before_what_the_cluster_states() {
        let config = Config::parse(br#"{"models":{"a":{"targets":[{"model":"x"}],"answer":"asked"}}}"#).unwrap();
        let to = |model: &str| vec![Target { model: model.into(), weight: 1 }];
        let aliases = [("a".to_owned(), to("y")), ("b".to_owned(), to("z"))].into();
        let mut stated = Stated { aliases, ..Stated::default() };
        let model = |stated: &Stated, asked: &str| {
            alias(&config, stated, asked).map(|(targets, is_put_back)| (targets[0].model.clone(), is_put_back))
        };
        assert_eq!(model(&stated, "a"), Some(("x".to_owned(), true)));
        assert_eq!(model(&stated, "b"), Some(("z".to_owned(), false)));
        assert_eq!(model(&stated, "c"), None);
        stated.others = to("w");
        assert_eq!(model(&stated, "c"), Some(("w".to_owned(), false)));
        assert!(is_named(&config, &stated, "w") && is_named(&config, &stated, "x") && !is_named(&config, &stated, "c"));
    }
}
