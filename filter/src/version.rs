//! Which build of the filter this is.

/// Release.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Source revision, set by the Makefile.
pub const BUILD: &str = match option_env!("PD_BUILD") {
    Some(build) => build,
    None => "unknown",
};
/// Target features that this build was made with.
pub const FEATURES: &str = if cfg!(target_feature = "simd128") { "simd128" } else { "none" };
