//! Explanation of a choice, for people.

use crate::choose::scheduler::{Decision, Prompt, Scheduler, WholeReason};
use crate::endpoints::candidates::Candidates;
use crate::prefix::index::EndpointIndex;

impl Scheduler<'_> {
    /// Says in one line what [`decide`](Self::decide) chooses, and from what: for people, its form may change.
    ///
    /// Seconds of work ahead `W`, seconds for the prompt `S`, what counts `W+wS`, tokens thought to be cached.
    #[must_use]
    pub fn explain(&self, candidates: &Candidates, prompt: &Prompt) -> String {
        let name = |at: EndpointIndex| self.table.get(at).map_or("?", |slot| slot.address.as_ref());
        let (pick, choice, among) = match self.decide(candidates, prompt) {
            Decision::Nobody => return "nobody: no endpoint is ready".to_owned(),
            Decision::Split(pick) => (pick, "split: lowest W+wS", &candidates.compute),
            Decision::Whole(pick, why) => {
                let why = match why {
                    WholeReason::Short => "whole: shorter than the threshold",
                    WholeReason::Cached => "whole: lacks less than the threshold",
                    WholeReason::Never => "whole: never split, lowest W+wS",
                    WholeReason::NoPrefill => "whole: nobody to split with, lowest W+wS",
                    WholeReason::Aggregated => "whole: aggregated, lowest W+wS",
                    WholeReason::Several => "whole: several sequences, lowest W+wS",
                };
                (pick, why, &candidates.whole)
            }
        };
        let (mut shortlist, owner) = self.shortlist(among, prompt, &[]);
        let session = self.session_holder(among, prompt);
        shortlist.extend(self.table.get(pick.endpoint).map(|slot| (pick.endpoint, slot)));
        shortlist.sort_unstable_by_key(|(at, _)| *at);
        shortlist.dedup_by_key(|(at, _)| *at);
        let mut costs: Vec<_> = shortlist
            .into_iter()
            .map(|(at, slot)| (self.cost(at, slot, prompt, (owner == Some(at), session == Some(at))), at, slot))
            .collect();
        costs.sort_by(|a, b| a.0.1.total_cmp(&b.0.1));
        let mut text = format!(
            "{choice}: {}; {:.0} tokens, w={}, {} of {} candidates",
            name(pick.endpoint),
            prompt.tokens,
            self.pool.affinity_weight,
            costs.len(),
            among.len(),
        );
        for ((of, cost), at, slot) in costs {
            let (work, decode) = (slot.work(self.now), slot.decode_tokens());
            text.push_str(&format!(
                "; {} W={work:.3} S={:.3} W+wS={cost:.3} match={:.0} decode={decode}{}{}{}",
                slot.address,
                of.seconds,
                of.matched_tokens,
                if owner == Some(at) { " owner" } else { "" },
                if session == Some(at) { " session" } else { "" },
                if self.is_usable(slot) { "" } else { " failing" },
            ));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use crate::choose::scheduler::tests::{Fixture, fixture, prompt};
    use crate::endpoints::candidates::Candidates;

    #[test]
    fn an_explanation_names_the_choice_first_and_its_reasons() {
        let mut fixture = fixture(3, 2, "");
        fixture.index.insert(2, &prompt(1, 20).hash.blocks);
        fixture.busy(1, 2.0);
        let explain = |fixture: &Fixture| fixture.scheduler().explain(&fixture.candidates, &prompt(1, 40));
        let text = explain(&fixture);
        assert!(
            text.starts_with("split: lowest W+wS: 10.0.0.1:3; 6144 tokens, w=3, 3 of 3 candidates; 10.0.0.1:3 W=0.000"),
            "{text}"
        );
        assert!(text.contains("match=2560") && text.contains("10.0.0.1:2 W=2.000"), "{text}");
        let short = fixture.scheduler().explain(&fixture.candidates, &prompt(1, 1));
        assert!(short.starts_with("whole: shorter than the threshold: 10.0.0.1:100"), "{short}");
        assert!(fixture.scheduler().explain(&Candidates::default(), &prompt(1, 1)).starts_with("nobody"));
    }
}
