//! Rights of filters, operators, replicas, and clients without a token.

use axum::http::{HeaderValue, Method};
use pd_core::envoys::message::EXCHANGE_PATH;

use crate::access::token::Token;

/// Path that sets the log level.
pub const LOG_LEVEL_PATH: &str = "/v1/log-level";

/// The tokens of pd-control.
#[derive(Clone, Debug, Default)]
pub struct Rights {
    /// Token of filters; none: anyone may read.
    pub filter: Option<Token>,
    /// Token of replicas; none: replicas use the filters' token.
    pub replicas: Option<Token>,
    /// Token of operators; none: operators use the filters' token.
    pub operator: Option<Token>,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The request has no token that opens the path.
    TokenNeeded,
    /// pd-control has no token, so only clients on the same host may write.
    NoTokenSet,
}

impl Rights {
    /// Checks whether a client may send a request. `is_local`: the client runs on the same host.
    ///
    /// - Filters and operators may read the list.
    /// - Filters and replicas may use the exchange.
    /// - Operators may set the log level.
    /// - Filters and operators may send every other request.
    ///
    /// # Errors
    /// [`Refusal`]: why the client may not send the request.
    pub fn check(
        &self,
        method: &Method,
        path: &str,
        authorization: Option<&HeaderValue>,
        is_local: bool,
    ) -> Result<(), Refusal> {
        let has = |token: &Option<Token>| token.as_ref().is_some_and(|token| token.is_in(authorization));
        let (is_filter, is_operator) = (has(&self.filter), has(&self.operator));
        if path == EXCHANGE_PATH && has(&self.replicas) {
            return Ok(());
        }
        let is_log_level = path == LOG_LEVEL_PATH && method == Method::PUT;
        let needed = match () {
            () if is_log_level => self.operator.as_ref().or(self.filter.as_ref()),
            () => self.filter.as_ref(),
        };
        let is_write = is_log_level || path == EXCHANGE_PATH;
        if needed.is_none() {
            return if is_write && !is_local { Err(Refusal::NoTokenSet) } else { Ok(()) };
        }
        let opens = match () {
            () if is_log_level && self.operator.is_some() => is_operator,
            () if path == EXCHANGE_PATH => is_filter,
            () => is_filter || is_operator,
        };
        if opens { Ok(()) } else { Err(Refusal::TokenNeeded) }
    }

    /// Whether a client that [may](Self::check) send to the exchange speaks for Envoys other than itself.
    #[must_use]
    pub fn may_relay(&self, authorization: Option<&HeaderValue>) -> bool {
        self.replicas.as_ref().is_none_or(|token| token.is_in(authorization))
    }
}

#[cfg(test)]
mod tests {
    use pd_core::wire::WATCH_PATH;

    use super::*;

    /// What clients with no token, the filters' and the operators' may do: the log level, the exchange, the list, the status.
    fn allowed(rights: &Rights, is_local: bool) -> [String; 3] {
        let requests = [
            (Method::PUT, LOG_LEVEL_PATH),
            (Method::POST, EXCHANGE_PATH),
            (Method::GET, WATCH_PATH),
            (Method::GET, "/v1/status"),
        ];
        ["", "Bearer filter", "Bearer operator"].map(|token| {
            let header = HeaderValue::from_static(token);
            let letter = |(method, path): &(Method, &str)| match rights.check(method, path, Some(&header), is_local) {
                Ok(()) => 'y',
                Err(Refusal::TokenNeeded) => 'n',
                Err(Refusal::NoTokenSet) => 'x',
            };
            requests.iter().map(letter).collect()
        })
    }

    fn rights(filter: bool, operator: bool) -> Rights {
        let token = |is_set: bool, text| Token::new(text).filter(|_| is_set);
        Rights { filter: token(filter, "filter"), operator: token(operator, "operator"), replicas: None }
    }

    #[test]
    fn only_replicas_speak_for_others_where_they_have_a_token() {
        let replica = HeaderValue::from_static("Bearer replica");
        let filter = HeaderValue::from_static("Bearer filter");
        let shared = rights(true, true);
        assert!(shared.may_relay(Some(&filter)));
        for filters_have_one in [true, false] {
            let own = Rights { replicas: Token::new("replica"), ..rights(filters_have_one, true) };
            assert!(own.may_relay(Some(&replica)) && !own.may_relay(Some(&filter)) && !own.may_relay(None));
            let may = |method, path, header| own.check(&method, path, Some(header), false).is_ok();
            assert!(may(Method::POST, EXCHANGE_PATH, &replica));
            assert_eq!(may(Method::POST, EXCHANGE_PATH, &filter), filters_have_one);
            assert!(!may(Method::PUT, LOG_LEVEL_PATH, &replica));
            assert_eq!(may(Method::GET, "/v1/status", &replica), !filters_have_one);
        }
    }

    #[test]
    fn each_token_opens_what_its_holder_needs() {
        for is_local in [true, false] {
            assert_eq!(allowed(&rights(true, true), is_local), ["nnnn", "nyyy", "ynyy"]);
            assert_eq!(allowed(&rights(true, false), is_local), ["nnnn", "yyyy", "nnnn"]);
        }
    }

    #[test]
    fn without_a_token_nobody_writes_from_elsewhere() {
        assert_eq!(allowed(&rights(false, false), true), ["yyyy"; 3]);
        assert_eq!(allowed(&rights(false, false), false), ["xxyy"; 3]);
        assert_eq!(allowed(&rights(false, true), false), ["nxyy", "nxyy", "yxyy"]);
    }
}
