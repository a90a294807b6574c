//! Our images: the filter's module, which Envoy Gateway fetches, and programs for nodes.
//!
//! Envoy Gateway takes the last layer of an image (`application/vnd.oci.image.layer.v1.tar+gzip`) and in it the file
//! `plugin.wasm`. The same module makes the same bytes: no times, no owners, fixed order. There is one image and no index
//! of platforms, since a module is the same on all of them and Envoy Gateway asks for none. A program's image is one file,
//! too: it is linked statically.
#![forbid(unsafe_code)]

pub mod elf;
pub mod layout;
pub mod manifest;
pub mod registry;
#[cfg(feature = "start")]
pub mod start;
