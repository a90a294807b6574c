//! Engine simulator.
