//! End-to-end rig.
