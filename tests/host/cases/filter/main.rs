//! The built filter on a host that behaves as Envoy's.

mod budgets;
mod changes;
mod chunks;
mod clients;
mod configuration;
mod conversations;
mod cost;
mod events;
mod exchange;
mod faults;
mod flow;
mod gateway;
mod header_bytes;
mod hostile;
mod matrix;
mod push;
mod rejected;
mod sharing;
mod waiting;
