//! Outlier detection: whether an endpoint answers errors that its peers do not answer.
//!
//! An endpoint that fails at once is always the least loaded one, so without detection it would win most choices. Its peers
//! are the ready endpoints of the same pool and role. Where the peers answer the same error, the cause is not the endpoint,
//! and the endpoint is not ejected. An endpoint that answers nothing but errors of one class while a peer answers without
//! them is ejected in any case.

/// The leg that an endpoint answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leg {
    /// A prefill leg.
    Prefill,
    /// A decode leg, or a whole request.
    Decode,
}

/// Classes of errors. An endpoint is compared with its peers within one class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// 5xx other than 503.
    Server,
    /// 429 or 503: the endpoint says that it is full.
    Overload,
    /// 4xx to a prefill leg that another endpoint accepts. For decode legs, which are not repeated: 401, 403 or 404.
    Refusal,
}

impl ErrorClass {
    /// The class of a status; `None` where the status is no error, or may be the client's.
    #[must_use]
    pub const fn of_status(status: u16) -> Option<Self> {
        match status {
            429 | 503 => Some(Self::Overload),
            500.. => Some(Self::Server),
            _ => None,
        }
    }

    /// Number of the class in an event. 0 stands for no error.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Server => 1,
            Self::Overload => 2,
            Self::Refusal => 3,
        }
    }

    /// The class of that number; `None` for a number of no class.
    pub(crate) const fn of_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Server),
            2 => Some(Self::Overload),
            3 => Some(Self::Refusal),
            _ => None,
        }
    }

    /// Errors in a row that make an endpoint suspect.
    ///
    /// - Overload takes more of them: an endpoint may be full for a moment.
    /// - Refusals of a decode endpoint must fill the window: a single one may be the client's fault.
    const fn in_a_row(self, leg: Leg) -> u32 {
        match (self, leg) {
            (Self::Refusal, Leg::Decode) => WINDOW,
            (Self::Server | Self::Refusal, _) => 3,
            (Self::Overload, _) => 5,
        }
    }
}

/// Answers that are compared. The window of each class has one bit for each.
const WINDOW: u32 = 16;
/// Answers alike that show that an endpoint always answers so.
const ALWAYS: u32 = 8;

/// Latest answers of an endpoint to one kind of leg. All zero: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Recent {
    /// Answers in the windows, at most [`WINDOW`].
    answers: u16,
    /// Errors of each class; the newest answer is the lowest bit.
    errors: [u16; 3],
}

/// Latest answers of an endpoint: 16 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    prefill: Recent,
    decode: Recent,
}

/// Sums over the peers of an endpoint: their latest answers, and how many of them are ejected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    answers: u32,
    errors: u32,
    /// Peers.
    endpoints: u32,
    ejected: u32,
    /// Whether one of them gets requests and answered none of the latest with this error.
    is_one_good: bool,
}

impl Answers {
    /// Notes an answer; `None`: without an error. The last 16 answers count.
    pub fn note(&mut self, leg: Leg, error: Option<ErrorClass>) {
        let recent = match leg {
            Leg::Prefill => &mut self.prefill,
            Leg::Decode => &mut self.decode,
        };
        recent.answers = recent.answers.saturating_add(1).min(WINDOW as u16);
        for (class, window) in
            [ErrorClass::Server, ErrorClass::Overload, ErrorClass::Refusal].iter().zip(&mut recent.errors)
        {
            *window = (*window << 1) | u16::from(error == Some(*class));
        }
    }

    /// Whether one of the latest answers is an error.
    #[must_use]
    pub fn has_errors(&self, leg: Leg) -> bool {
        self.recent(leg).errors.iter().any(|window| *window != 0)
    }

    /// Whether an endpoint answered this error several times in a row, or to half of a full window. Refusals of a decode
    /// endpoint must fill the window.
    #[must_use]
    pub fn is_suspect(&self, leg: Leg, class: ErrorClass) -> bool {
        let window = self.window(leg, class);
        let row = class.in_a_row(leg);
        window.trailing_ones() >= row || (row < WINDOW && window.count_ones() >= WINDOW / 2)
    }

    /// Whether an endpoint answers nothing but this error while one of its peers answers without it. It may then be ejected
    /// though others answer as it does, and though most of the pool is ejected.
    #[must_use]
    pub fn is_hopeless(&self, leg: Leg, class: ErrorClass, peers: &Peers) -> bool {
        self.window(leg, class).trailing_ones() >= ALWAYS && peers.is_one_good
    }

    /// Whether the peers answer errors of this class less than half as often, relative to their latest answers. The answers
    /// of this endpoint are those in the row of errors that makes it suspect.
    #[must_use]
    pub fn is_worse_than(&self, leg: Leg, class: ErrorClass, peers: &Peers) -> bool {
        let window = self.window(leg, class);
        let recent = self.recent(leg);
        let (errors, answers) = match window.trailing_ones() {
            0 => (window.count_ones(), u32::from(recent.answers)),
            row => (row, row),
        };
        // errors / answers > 2 · peers.errors / peers.answers; without any answer the peers count as healthy.
        let own = u64::from(errors).saturating_mul(u64::from(peers.answers.max(1)));
        let theirs = u64::from(peers.errors).saturating_mul(u64::from(answers)).saturating_mul(2);
        errors > 0 && own > theirs
    }

    const fn recent(&self, leg: Leg) -> &Recent {
        match leg {
            Leg::Prefill => &self.prefill,
            Leg::Decode => &self.decode,
        }
    }

    const fn window(&self, leg: Leg, class: ErrorClass) -> u16 {
        let [server, overload, refusal] = self.recent(leg).errors;
        match class {
            ErrorClass::Server => server,
            ErrorClass::Overload => overload,
            ErrorClass::Refusal => refusal,
        }
    }
}

impl Peers {
    /// Adds one peer's answers to one kind of leg. `is_ejected`: the peer gets no requests now.
    pub fn add(&mut self, answers: &Answers, leg: Leg, class: ErrorClass, is_ejected: bool) {
        self.answers = self.answers.saturating_add(u32::from(answers.recent(leg).answers));
        self.errors = self.errors.saturating_add(answers.window(leg, class).count_ones());
        self.endpoints = self.endpoints.saturating_add(1);
        self.ejected = self.ejected.saturating_add(u32::from(is_ejected));
        self.is_one_good |= answers.window(leg, class) == 0 && !is_ejected;
    }

    /// Whether one more endpoint may be ejected: at most half of them are, and never the last one.
    #[must_use]
    pub fn allow_ejection(&self) -> bool {
        self.ejected.saturating_add(1) <= self.endpoints.saturating_add(1) / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEG: Leg = Leg::Decode;

    fn answers(errors: &[Option<ErrorClass>]) -> Answers {
        let mut answers = Answers::default();
        errors.iter().for_each(|error| answers.note(LEG, *error));
        answers
    }

    fn peers(of: &[(Answers, bool)], class: ErrorClass) -> Peers {
        let mut peers = Peers::default();
        of.iter().for_each(|(answers, is_ejected)| peers.add(answers, LEG, class, *is_ejected));
        peers
    }

    #[test]
    fn errors_in_a_row_or_in_half_of_the_answers_make_an_endpoint_suspect() {
        for (class, row) in [(ErrorClass::Server, 3), (ErrorClass::Overload, 5)] {
            assert!(!answers(&vec![Some(class); row - 1]).is_suspect(LEG, class));
            assert!(answers(&vec![Some(class); row]).is_suspect(LEG, class));
            assert!(answers(&[None, Some(class)].repeat(8)).is_suspect(LEG, class));
            assert!(!answers(&[None, None, Some(class)].repeat(8)).is_suspect(LEG, class));
            assert!(!answers(&vec![Some(class); row]).is_suspect(Leg::Prefill, class), "each kind of leg for itself");
        }
    }

    #[test]
    fn a_decode_endpoint_is_suspect_only_where_it_refuses_everything() {
        let class = ErrorClass::Refusal;
        assert!(!answers(&[Some(class); 15]).is_suspect(LEG, class));
        assert!(answers(&[Some(class); 16]).is_suspect(LEG, class));
        let mixed = [&[Some(class); 15][..], &[None], &[Some(class); 15]].concat();
        assert!(!answers(&mixed).is_suspect(LEG, class), "one client's fault");
        let mut of_prefill = Answers::default();
        (0..3).for_each(|_| of_prefill.note(Leg::Prefill, Some(class)));
        assert!(of_prefill.is_suspect(Leg::Prefill, class), "another endpoint accepted the same");
    }

    #[test]
    fn an_endpoint_is_worse_only_where_its_peers_do_not_answer_the_same() {
        let class = ErrorClass::Overload;
        let bad = answers(&[Some(class); 5]);
        let worse = |of: &[Answers]| {
            let of: Vec<_> = of.iter().map(|answers| (*answers, false)).collect();
            bad.is_worse_than(LEG, class, &peers(&of, class))
        };
        assert!(worse(&[answers(&[None; 20])]));
        assert!(worse(&[Answers::default()]), "a peer without answers counts as healthy");
        assert!(worse(&[answers(&[Some(ErrorClass::Server); 9])]), "another class is another cause");
        assert!(worse(&[answers(&[None, None, None, Some(class)])]));
        assert!(!worse(&[answers(&[None, Some(class)])]));
        assert!(!worse(&[bad, bad]));
    }

    #[test]
    fn an_endpoint_that_always_fails_is_hopeless_while_a_peer_that_gets_requests_never_does() {
        let class = ErrorClass::Server;
        let (bad, good) = (answers(&[Some(class); 8]), answers(&[None; 8]));
        let hopeless = |own: &Answers, of: &[(Answers, bool)]| own.is_hopeless(LEG, class, &peers(of, class));
        assert!(hopeless(&bad, &[(bad, true), (bad, true), (good, false)]));
        assert!(
            !bad.is_worse_than(LEG, class, &peers(&[(bad, true), (bad, true), (good, false)], class)),
            "most do the same"
        );
        assert!(!hopeless(&answers(&[Some(class); 7]), &[(good, false)]), "too few");
        assert!(!hopeless(&bad, &[(good, true)]), "it gets no requests");
        assert!(hopeless(&bad, &[(Answers::default(), false)]), "a peer without answers counts as healthy");
        assert!(!hopeless(&bad, &[(answers(&[&[Some(class)][..], &[None; 15]].concat()), false)]), "it fails, too");
        assert!(
            hopeless(&bad, &[(answers(&[Some(ErrorClass::Overload); 8]), false)]),
            "another class is another cause"
        );
        assert!(!hopeless(&bad, &[]));
    }

    #[test]
    fn at_most_half_of_a_pool_is_ejected_and_never_the_last_endpoint() {
        let fine = (Answers::default(), false);
        let out = (Answers::default(), true);
        let allowed = |of: &[(Answers, bool)]| peers(of, ErrorClass::Server).allow_ejection();
        assert!(!allowed(&[]));
        assert!(allowed(&[fine]));
        assert!(!allowed(&[out]));
        assert!(!allowed(&[fine, out]));
        assert!(allowed(&[fine, fine, out]));
        assert!(!allowed(&[fine, out, out]));
    }
}
