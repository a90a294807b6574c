//! Nothing but tests: see `cases`.
