//! Text that describes a choice to a person.

use crate::choose::decider::{Schedule, WholeReason};
use crate::choose::prompt::Prompt;
use crate::choose::scheduler::{CostedPick, Scheduler};
use crate::endpoints::candidates::Candidates;
use crate::prefix::index::EndpointIndex;

impl Scheduler<'_> {
    /// Describes in one line what [`schedule`](Self::schedule) chooses, and among which endpoints. Releases may change the
    /// form of the line.
    ///
    /// For each compared endpoint the line has W, S and W + w·S in seconds, w, matched tokens, assigned tokens, and whether
    /// the endpoint is the rendezvous endpoint, the endpoint of the session, or ejected.
    #[must_use]
    pub fn explain(&self, candidates: &Candidates, prompt: &Prompt) -> String {
        let name = |index: EndpointIndex| self.table.get(index).map_or("?", |state| state.address.as_ref());
        let (pick, choice, among) = match self.schedule(candidates, prompt) {
            Schedule::Nobody => return "nobody: no endpoint is ready".to_owned(),
            Schedule::Split(pick) => (pick, "split: lowest W+wS", &candidates.compute),
            Schedule::Whole(pick, why) => {
                let why = match why {
                    WholeReason::Short => "whole: shorter than the threshold",
                    WholeReason::Cached => "whole: lacks less than the threshold",
                    WholeReason::Cheaper => "whole: costs less than split",
                    WholeReason::Never => "whole: never split, lowest W+wS",
                    WholeReason::NoPrefill => "whole: nobody to split with, lowest W+wS",
                    WholeReason::Aggregated => "whole: aggregated, lowest W+wS",
                    WholeReason::Several => "whole: several sequences, lowest W+wS",
                    WholeReason::Refusable => "whole: decode may refuse it, lowest W+wS",
                    WholeReason::Stored => "whole: at the endpoint that keeps the response",
                    WholeReason::DescribesPrompt => "whole: the answer describes the prompt, lowest W+wS",
                    WholeReason::TooLong => "whole: no room for its answer, lowest W+wS",
                };
                (pick, why, &candidates.whole)
            }
        };
        let shortlist = self.view().shortlist(among, prompt, &[]);
        let (legs_each, owner) = (shortlist.legs_each, shortlist.owner);
        let session = self.view().session_holder(among, prompt);
        let mut compared = shortlist.endpoints;
        compared.extend(self.table.get(pick.endpoint).map(|state| (pick.endpoint, state)));
        compared.sort_unstable_by_key(|(index, _)| *index);
        compared.dedup_by_key(|(index, _)| *index);
        let mut costs: Vec<_> = compared
            .into_iter()
            .map(|(index, state)| {
                let claims = (owner == Some(index), session == Some(index));
                (self.cost(index, state, prompt, claims, legs_each), index, state)
            })
            .collect();
        costs.sort_by(|a, b| a.0.cost.total_cmp(&b.0.cost));
        let mut text = format!(
            "{choice}: {}; {:.0} tokens, {} of {} candidates",
            name(pick.endpoint),
            prompt.tokens,
            costs.len(),
            among.len(),
        );
        for (CostedPick { pick: of, cost, weight }, index, state) in costs {
            let (work, decode) = (state.work(self.now), state.decode_tokens());
            text.push_str(&format!(
                "; {} W={work:.3} S={:.3} w={weight:.1} W+wS={cost:.3} match={:.0} decode={decode}{}{}{}",
                state.address,
                of.seconds,
                of.matched_tokens,
                if owner == Some(index) { " owner" } else { "" },
                if session == Some(index) { " session" } else { "" },
                if self.view().is_usable(state) { "" } else { " failing" },
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
            text.starts_with("split: lowest W+wS: 10.0.0.1:3; 6144 tokens, 3 of 3 candidates; 10.0.0.1:3 W=0.000"),
            "{text}"
        );
        assert!(text.contains("match=2560") && text.contains("10.0.0.1:2 W=2.000"), "{text}");
        let short = fixture.scheduler().explain(&fixture.candidates, &prompt(1, 1));
        assert!(short.starts_with("whole: shorter than the threshold: 10.0.0.1:100"), "{short}");
        assert!(fixture.scheduler().explain(&Candidates::default(), &prompt(1, 1)).starts_with("nobody"));
    }
}
