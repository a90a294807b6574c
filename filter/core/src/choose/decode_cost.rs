//! The cost of a decode endpoint: the KV tokens that it has assigned, and the tokens that must be moved to it.

/// Formula by which decode endpoints are compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecodeCost {
    /// Seconds to move the KV of one token: its bytes by the bandwidth between endpoints. 131 kB (8 billion parameters,
    /// 16 bits) at 52 GB/s are 2.5 µs.
    pub move_seconds: f64,
    /// Seconds that one token in the KV cache adds to each step: its bytes by the bandwidth of the memory. 131 kB at
    /// 3.35 TB/s (H100) are 39 ns.
    pub step_seconds: f64,
    /// Steps that a request is expected to take: tokens of its answer.
    pub steps: f64,
    /// Bound within which a conversation stays at its endpoint: that endpoint may exceed the least loaded one by `stay`
    /// times the request's tokens. 0 or more; 0: the choice ignores the conversation. With 10 the turns of coding agents
    /// move half of the tokens that they move with 2, and 99 % of the streams are 2 % slower than with the fewest assigned
    /// tokens (`make sim`, 30 % load; docs/routing.md).
    pub stay: f64,
}

impl Default for DecodeCost {
    fn default() -> Self {
        Self { move_seconds: 2.5e-6, step_seconds: 3.9e-8, steps: 256.0, stay: 10.0 }
    }
}

/// Share of a prompt that an endpoint must hold for the conversation to be there.
const CONVERSATION: f64 = 0.5;

/// A decode endpoint, for one request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DecodeLoad {
    /// Assigned tokens, divided by the endpoint's weight; 0 or more.
    pub assigned: f64,
    /// Tokens of the prompt that the endpoint holds; 0 or more.
    pub held: f64,
    /// Seconds of prompts that the endpoint computes itself, 0 or more. A stream that begins meanwhile stands still for as
    /// long.
    pub work: f64,
    /// Whether the endpoint served the session of the request last.
    pub is_session: bool,
}

impl DecodeCost {
    /// Seconds that the choice of an endpoint costs for a prompt of `tokens`: `move·missing + step·steps·assigned + work`.
    ///
    /// The first term is the time until the answer begins. The others are the time that the answer takes longer, because
    /// the endpoint reads the KV cache of other requests in each step, and computes the prompts that it has.
    #[must_use]
    pub fn seconds(&self, tokens: f64, load: DecodeLoad) -> f64 {
        self.move_seconds * (tokens - load.held).max(0.0) + self.answer_seconds(load) + load.work
    }

    /// The second term of [`seconds`](Self::seconds).
    #[must_use]
    pub fn answer_seconds(&self, load: DecodeLoad) -> f64 {
        self.step_seconds * self.steps * load.assigned
    }

    /// Index in `loads` of the endpoint to choose; `None` where `loads` is empty.
    ///
    /// 1. The endpoint of the session, within the bound of [`stay`](Self::stay), and while the prompts that it computes
    ///    take no longer than a move of what it holds.
    /// 2. Within the same bounds, the endpoint that holds most of the prompt, if it holds half of the prompt or more.
    /// 3. The cheapest endpoint; of several with equal cost the first.
    ///
    /// The seconds leave out what a move costs other requests: it uses the network, and it displaces as many tokens from
    /// the cache of the new endpoint. The bound stands for that cost.
    #[must_use]
    pub fn choose(&self, tokens: f64, loads: &[DecodeLoad]) -> Option<usize> {
        let least = loads.iter().map(|load| load.assigned).reduce(f64::min)?;
        let has = |load: &DecodeLoad| load.is_session || load.held >= CONVERSATION * tokens;
        let is_inside = |load: &DecodeLoad| {
            let saved = self.move_seconds * if load.is_session { tokens } else { load.held };
            load.assigned - least <= self.stay * tokens && self.stay > 0.0 && load.work <= saved
        };
        let stays = loads.iter().enumerate().filter(|(_, load)| has(load) && is_inside(load));
        let place = |load: &DecodeLoad| (!load.is_session, -load.held, load.assigned);
        let better = |a: &(bool, f64, f64), b: &(bool, f64, f64)| {
            a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.total_cmp(&b.2))
        };
        let stays = stays.min_by(|(_, a), (_, b)| better(&place(a), &place(b)));
        let cheapest = || {
            let costs = loads.iter().enumerate().map(|(index, load)| (self.seconds(tokens, *load), index));
            costs.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, index)| index)
        };
        stays.map(|(index, _)| index).or_else(cheapest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(assigned: f64, held: f64) -> DecodeLoad {
        DecodeLoad { assigned, held, ..DecodeLoad::default() }
    }

    #[test]
    fn a_begin_is_worth_what_moving_it_takes() {
        let cost = DecodeCost { stay: 0.0, ..DecodeCost::default() };
        // 40,000 tokens are moved in 100 ms; 10,016 assigned tokens take as long over 256 steps.
        assert_eq!(cost.choose(100_000.0, &[load(0.0, 0.0), load(10_000.0, 40_000.0)]), Some(1));
        assert_eq!(cost.choose(100_000.0, &[load(0.0, 0.0), load(10_100.0, 40_000.0)]), Some(0));
        assert_eq!(cost.choose(100_000.0, &[load(50.0, 0.0), load(40.0, 0.0)]), Some(1));
        assert_eq!(cost.choose(100_000.0, &[load(40.0, 0.0), load(40.0, 0.0)]), Some(0));
        assert_eq!(cost.choose(100_000.0, &[]), None);
    }

    #[test]
    fn a_conversation_stays_inside_the_bound() {
        let cost = DecodeCost::default();
        let least = load(1_000.0, 0.0);
        assert_eq!(cost.choose(100_000.0, &[least, load(1_001_000.0, 90_000.0)]), Some(1));
        assert_eq!(cost.choose(100_000.0, &[least, load(1_001_001.0, 90_000.0)]), Some(0));
        assert_eq!(cost.choose(100_000.0, &[least, load(1_001_000.0, 49_000.0)]), Some(0), "a common begin is none");
        assert_eq!(cost.choose(100_000.0, &[least, load(9e4, 60_000.0), load(9e4, 90_000.0)]), Some(2));
        let session = DecodeLoad { is_session: true, ..load(150_000.0, 0.0) };
        assert_eq!(cost.choose(100_000.0, &[least, load(9e4, 90_000.0), session]), Some(2));
        // To move 100,000 tokens takes 250 ms.
        let busy = |work| DecodeLoad { work, ..session };
        assert_eq!(cost.choose(100_000.0, &[least, busy(0.24)]), Some(1));
        assert_eq!(cost.choose(100_000.0, &[least, busy(0.26)]), Some(0));
    }

    #[test]
    fn a_stream_begins_where_no_prompt_is_computed() {
        let busy = |work| DecodeLoad { work, ..load(0.0, 0.0) };
        // 10,016 assigned tokens take 100 ms over 256 steps.
        assert_eq!(DecodeCost::default().choose(1_000.0, &[busy(0.09), load(10_016.0, 0.0)]), Some(0));
        assert_eq!(DecodeCost::default().choose(1_000.0, &[busy(0.11), load(10_016.0, 0.0)]), Some(1));
    }
}
