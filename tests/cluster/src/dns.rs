//! Names of services, `SERVICE.NAMESPACE.svc.cluster.local`, and of the registry.

use std::sync::Arc;

use anyhow::Context as _;
use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record, RecordType};
use tokio::net::UdpSocket;

use crate::network::{NODE, REGISTRY};
use crate::services::Services;

/// Seconds for which an answer is good.
const TTL: u32 = 1;
/// Bytes of the largest query that is read.
const MAX_QUERY_BYTES: usize = 4_096;

/// Answers queries until it is dropped.
///
/// # Errors
/// When the port is taken.
pub async fn run(services: Arc<Services>) -> anyhow::Result<()> {
    let socket = UdpSocket::bind((NODE, 53)).await.context("DNS")?;
    let mut buffer = vec![0; MAX_QUERY_BYTES];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
        if let Some(answer) = buffer.get(..length).and_then(|query| answer(query, &services)) {
            let _ = socket.send_to(&answer, from).await;
        }
    }
}

/// Unknown names do not exist: clients that try search domains go on only then.
fn answer(query: &[u8], services: &Services) -> Option<Vec<u8>> {
    let query = Message::from_vec(query).ok()?;
    let asked = query.queries.first()?.clone();
    let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
    answer.metadata.message_type = MessageType::Response;
    answer.metadata.recursion_desired = query.metadata.recursion_desired;
    answer.metadata.authoritative = true;
    answer.add_query(asked.clone());
    let name = asked.name().to_ascii().to_ascii_lowercase();
    let parts: Vec<_> = name.trim_end_matches('.').split('.').collect();
    let addresses = match parts.as_slice() {
        _ if name.trim_end_matches('.') == REGISTRY => Some(vec![NODE]),
        [service, namespace, "svc", "cluster", "local"] => services.resolve(namespace, service),
        _ => None,
    };
    match addresses {
        Some(addresses) if asked.query_type() == RecordType::A => {
            for address in addresses {
                answer.add_answer(Record::from_rdata(asked.name().clone(), TTL, RData::A(A(address))));
            }
        }
        Some(_) => {}
        None => answer.metadata.response_code = ResponseCode::NXDomain,
    }
    answer.to_vec().ok()
}
