//! Models by name from a Hugging Face hub into the cache that Hugging Face's tools share.
//!
//! Only files that cannot run code are fetched: configurations, tokenizers, templates, safetensors and GGUF. What the
//! hub says about a file (its length and checksum) is asked for first; every byte is checked against it before the
//! file gets its name. An interrupted transfer goes on where it stopped.
//!
//! Files in reading order: `error.rs`, `listing.rs` (what a model consists of), `client.rs` (requests), `digest.rs`
//! (checksums), `pull.rs` (into the cache).

#![forbid(unsafe_code)]

mod client;
mod digest;
mod error;
mod listing;
mod pull;

pub use error::HubError;
pub use ounce_io::{HubName, hub_name};
pub use pull::{Progress, PullRecord, PullSettings, pull};
