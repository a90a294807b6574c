//! Whose answer it is: an engine's, or Envoy's own.

/// What Envoy says of an answer that came from a host (`response.code_details`).
const FROM_UPSTREAM: &[u8] = b"via_upstream";

/// The address of the host that answered; `None` where no host did, and the answer, an error, is Envoy's own. Envoy names
/// the host that it tried last in either case, so an error is Envoy's unless its details say otherwise.
///
/// `code_details` and `address` are read from the host only where they matter.
pub fn answering_host(
    status: Option<u16>,
    code_details: impl FnOnce() -> Option<Vec<u8>>,
    address: impl FnOnce() -> Option<Vec<u8>>,
) -> Option<Vec<u8>> {
    let is_error = status.is_none_or(|status| status >= 400);
    let is_envoys = is_error && code_details().is_some_and(|details| details != FROM_UPSTREAM);
    if is_envoys { None } else { address() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &[u8] = b"10.0.0.1:80";

    fn host(status: Option<u16>, details: Option<&[u8]>) -> Option<Vec<u8>> {
        answering_host(status, || details.map(<[u8]>::to_vec), || Some(HOST.to_vec()))
    }

    #[test]
    fn an_error_of_envoys_own_has_no_host() {
        for status in [None, Some(503), Some(400)] {
            assert_eq!(host(status, Some(b"upstream_reset_before_response_started{connection_failure}")), None);
            assert_eq!(host(status, Some(b"")), None);
        }
    }

    #[test]
    fn an_engines_answer_has_one_whatever_its_status() {
        assert_eq!(host(Some(503), Some(b"via_upstream")).as_deref(), Some(HOST));
        assert_eq!(host(Some(200), Some(b"anything")).as_deref(), Some(HOST));
        assert_eq!(host(Some(500), None).as_deref(), Some(HOST), "an Envoy that tells no details is believed");
    }

    #[test]
    fn details_are_read_of_an_error_only() {
        let read = || -> Option<Vec<u8>> { panic!("a property is read that does not matter") };
        assert_eq!(answering_host(Some(200), read, || Some(HOST.to_vec())).as_deref(), Some(HOST));
        assert_eq!(answering_host(Some(503), || Some(b"direct_response".to_vec()), read), None);
    }
}
