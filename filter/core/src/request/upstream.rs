//! The answerer of a request: an engine, or Envoy itself. For an answer of Envoy it says whether an endpoint failed.

/// The answerer of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answerer<'a> {
    /// The host of this address, `ip:port`, with whatever status.
    Host(&'a [u8]),
    /// Envoy, because its last attempt at a host failed before the host answered: reset, or ended. `None` where Envoy names
    /// no host.
    FailedAttempt(Option<&'a [u8]>),
    /// Envoy, because it could not connect to the host of its last attempt. No process listens there, or listened.
    FailedConnect(Option<&'a [u8]>),
    /// Envoy, for a reason that is no endpoint's: another filter's answer, a full circuit breaker, no healthy host, a
    /// time limit.
    Envoy,
}

impl<'a> Answerer<'a> {
    /// Address of the host that answered.
    #[must_use]
    pub fn host(self) -> Option<&'a [u8]> {
        if let Self::Host(address) = self { Some(address) } else { None }
    }
}

/// What Envoy says of an answer that came from a host (`response.code_details`).
const FROM_UPSTREAM: &[u8] = b"via_upstream";
/// What Envoy says of an attempt that failed before its host answered; the reason follows in braces.
const FAILED_ATTEMPT: &[u8] = b"upstream_reset_before_response_started{";
/// Reasons in these braces that are Envoy's own. Envoy did not send the request, or ended it by a limit of its own.
const OWN_REASONS: [&[u8]; 4] = [b"overflow", b"no_healthy_upstream", b"upstream_per_try_timeout", b"overload_manager"];

/// The host's properties of an answer, from which [`answerer`](Self::answerer) finds its answerer.
///
/// For an error of its own, Envoy names the host that it tried last. So for errors the details count. They are read for errors
/// only.
#[derive(Clone, Debug, Default)]
pub struct AnswerSource {
    code_details: Option<Vec<u8>>,
    address: Option<Vec<u8>>,
}

impl AnswerSource {
    /// Reads the properties that matter for an answer with that status; `None`: the answer has no valid status.
    pub fn read(
        status: Option<u16>,
        code_details: impl FnOnce() -> Option<Vec<u8>>,
        address: impl FnOnce() -> Option<Vec<u8>>,
    ) -> Self {
        let is_error = status.is_none_or(|status| status >= 400);
        Self { code_details: if is_error { code_details() } else { None }, address: address() }
    }

    /// Whether Envoy says that it answers an error itself. An error without details is the host's.
    #[must_use]
    pub fn is_envoys_error(&self) -> bool {
        self.code_details.as_deref().is_some_and(|details| details != FROM_UPSTREAM)
    }

    /// The answerer. An error without details counts as the host's.
    #[must_use]
    pub fn answerer(&self) -> Answerer<'_> {
        let address = self.address.as_deref();
        match (self.code_details.as_deref(), address) {
            (None | Some(FROM_UPSTREAM), Some(address)) => Answerer::Host(address),
            (Some(details), _) => match details.strip_prefix(FAILED_ATTEMPT) {
                Some(reason) if OWN_REASONS.iter().any(|own| contains(reason, own)) => Answerer::Envoy,
                Some(reason) if contains(reason, b"connection_failure") => Answerer::FailedConnect(address),
                Some(_) => Answerer::FailedAttempt(address),
                None => Answerer::Envoy,
            },
            (None, None) => Answerer::Envoy,
        }
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &[u8] = b"10.0.0.1:80";

    fn of(status: Option<u16>, details: Option<&str>) -> AnswerSource {
        AnswerSource::read(status, || details.map(|details| details.as_bytes().to_vec()), || Some(HOST.to_vec()))
    }

    #[test]
    fn an_engines_answer_has_a_host_whatever_its_status() {
        assert_eq!(of(Some(503), Some("via_upstream")).answerer(), Answerer::Host(HOST));
        assert_eq!(of(Some(200), Some("anything")).answerer(), Answerer::Host(HOST));
        assert_eq!(of(Some(500), None).answerer(), Answerer::Host(HOST), "the filter believes the address");
        assert!(!of(Some(503), Some("via_upstream")).is_envoys_error() && !of(Some(500), None).is_envoys_error());
    }

    #[test]
    fn an_attempt_that_failed_is_its_hosts() {
        for reason in [
            "connection_termination",
            "connection_timeout",
            "remote_reset",
            "remote_refused_stream_reset",
            "protocol_error",
            "http1_premature_upstream_half_close",
        ] {
            let details = format!("upstream_reset_before_response_started{{{reason}}}");
            for status in [None, Some(503), Some(502)] {
                assert_eq!(of(status, Some(&details)).answerer(), Answerer::FailedAttempt(Some(HOST)), "{reason}");
            }
        }
    }

    #[test]
    fn a_failed_connection_is_recognised() {
        for reason in ["connection_failure", "remote_connection_failure|delayed_connect_error:_Connection_refused"] {
            let details = format!("upstream_reset_before_response_started{{{reason}}}");
            assert_eq!(of(Some(503), Some(&details)).answerer(), Answerer::FailedConnect(Some(HOST)), "{reason}");
        }
    }

    #[test]
    fn what_envoy_answers_for_other_reasons_is_no_hosts() {
        for details in [
            "",
            "upstream_reset_before_response_started",
            "upstream_reset_before_response_started{overflow}",
            "upstream_reset_before_response_started{overload_manager_reset}",
            "no_healthy_upstream",
            "no_healthy_upstream{no_healthy_upstream}",
            "upstream_per_try_timeout",
            "upstream_response_timeout",
            "response_timeout",
            "stream_idle_timeout",
            "request_overall_timeout",
            "upstream_max_stream_duration_reached",
            "max_duration_timeout",
            "local_rate_limited",
            "request_rate_limited",
            "rbac_access_denied_matched_policy[none]",
            "jwt_authn_access_denied{Jwt_is_missing}",
            "ext_authz_denied",
            "direct_response",
            "route_not_found",
            "downstream_remote_disconnect",
        ] {
            assert_eq!(of(Some(503), Some(details)).answerer(), Answerer::Envoy, "{details}");
            assert!(of(Some(503), Some(details)).is_envoys_error(), "{details}");
        }
        let without_host = AnswerSource::read(Some(200), || None, || None);
        assert_eq!(without_host.answerer(), Answerer::Envoy, "a filter behind this one answered");
    }

    #[test]
    fn details_are_read_of_an_error_only() {
        let read = || -> Option<Vec<u8>> { panic!("a property is read that does not matter") };
        assert_eq!(AnswerSource::read(Some(200), read, || Some(HOST.to_vec())).answerer(), Answerer::Host(HOST));
    }
}
