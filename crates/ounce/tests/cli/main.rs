//! Tests that drive the binary, as a person or a script would.
//!
//! Files: `lab` (a folder with a tiny model, and what runs the binary in it), `flow` (the whole way of
//! a model), `same_bits` (what must not change the result), `resume` (nothing is lost), `signals`
//! (stopped in any phase), `precision` (16 bits, the loss scale, numbers that are not finite),
//! `faults` (a disk that fails), `refusals` (errors, hints and exit codes), `damage` (files that are
//! not what they should be), `gguf` (models in that format), `chat_data` (conversations, packing,
//! mixtures), `tokenizing` (the child process and its memory), `stream` (data that is never tokenized whole).
#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

mod lab;

mod flow;

mod same_bits;

mod resume;

mod signals;

mod precision;

mod faults;

mod refusals;

mod damage;

mod gguf;

mod chat_data;

mod tokenizing;

mod stream;
