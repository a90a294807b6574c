//! Models that endpoints serve or served: their cards, and so which names are known.
//!
//! A model stays known after its last endpoint left the list: requests for it get 503, and requests for a name that no
//! endpoint ever served get 404. Up to [`MAX_CARDS`] models without an endpoint stay known. Beyond that, the worker forgets
//! those that left first.

use std::collections::BTreeMap;

use crate::wire::{MAX_CARDS, ModelCard};

/// Every model that is or was in the list.
#[derive(Debug, Default)]
pub(super) struct KnownModels {
    models: BTreeMap<String, Known>,
    /// Number of lists so far. It shows which model left first.
    lists: u64,
}

#[derive(Debug)]
struct Known {
    card: ModelCard,
    /// The last list in which an endpoint served it, by [`KnownModels::lists`].
    served_in: u64,
}

impl KnownModels {
    /// Takes the cards of a snapshot.
    pub(super) fn learn(&mut self, cards: &[ModelCard]) {
        for card in cards {
            self.entry(&card.id).card.clone_from(card);
        }
    }

    /// Takes the names that the endpoints of the list in force serve, and forgets models beyond the bound.
    pub(super) fn serve<'a>(&mut self, names: impl Iterator<Item = &'a str>) {
        self.lists = self.lists.wrapping_add(1);
        let lists = self.lists;
        for name in names {
            self.entry(name).served_in = lists;
        }
        let mut gone: Vec<(u64, &String)> =
            self.models.iter().filter(|(_, it)| it.served_in != lists).map(|(name, it)| (it.served_in, name)).collect();
        let Some(excess) = gone.len().checked_sub(MAX_CARDS).filter(|excess| *excess > 0) else { return };
        gone.sort_unstable();
        let forgotten: Vec<String> = gone.into_iter().take(excess).map(|(_, name)| name.clone()).collect();
        for name in forgotten {
            self.models.remove(&name);
        }
    }

    /// The card of a model; `None` where no endpoint ever served it.
    pub(super) fn get(&self, model: &str) -> Option<&ModelCard> {
        self.models.get(model).map(|known| &known.card)
    }

    /// The cards, at most as many as a snapshot may have; those of served models first.
    pub(super) fn cards(&self) -> Vec<ModelCard> {
        let is_served = |known: &&Known| known.served_in == self.lists;
        let served = self.models.values().filter(is_served);
        let gone = self.models.values().filter(|known| !is_served(known));
        served.chain(gone).take(MAX_CARDS).map(|known| known.card.clone()).collect()
    }

    fn entry(&mut self, name: &str) -> &mut Known {
        self.models.entry(name.to_owned()).or_insert_with(|| Known { card: ModelCard::new(name), served_in: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_left_first_is_forgotten_first_and_what_is_served_stays() {
        let mut models = KnownModels::default();
        for list in 0..MAX_CARDS + 10 {
            models.serve(["base", &format!("m{list}")].into_iter());
        }
        assert_eq!(models.models.len(), MAX_CARDS + 2);
        assert!(models.get("base").is_some() && models.get("m0").is_none() && models.get("m8").is_none());
        assert!(models.get("m9").is_some() && models.get("m4000").is_some());
        assert_eq!(models.cards().len(), MAX_CARDS);
        assert_eq!(models.cards()[0].id, "base");
    }

    #[test]
    fn a_card_stays_until_another_one_comes() {
        let mut models = KnownModels::default();
        let card = |len| ModelCard { max_model_len: Some(len), ..ModelCard::new("m") };
        models.learn(&[card(8)]);
        models.serve(["m"].into_iter());
        models.serve([].into_iter());
        assert_eq!(models.get("m"), Some(&card(8)));
        models.learn(&[card(4)]);
        assert_eq!(models.get("m"), Some(&card(4)));
    }
}
