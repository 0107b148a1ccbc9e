//! The child's side of `child.rs`: every kind of work that there is.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::child::{Work, reply};
use crate::{Error, Result, model, stream, tokenize};

/// The child's whole work: a request in, an answer out.
///
/// # Errors
/// A request that is not one; failures of the work itself are part of the answer.
pub fn answer_tokenize_request(request: &str) -> Result<String> {
    let Work { kind, request } = serde_json::from_str(request).map_err(|e| not_a_request(&e))?;
    Ok(reply(match &*kind {
        tokenize::WORK => answer(request, tokenize::tokenize)?,
        stream::WORK => answer(request, stream::make_window)?,
        model::WORK => answer(request, model::write_side_files)?,
        _ => return Err(not_a_request(&format!("no work is called `{kind}`"))),
    }))
}

/// The answer to a request, or what went wrong.
///
/// # Errors
/// A request of another kind.
fn answer<T: DeserializeOwned, A: Serialize>(
    request: Value,
    work: impl FnOnce(&T) -> Result<A>,
) -> Result<Result<Value>> {
    let request = serde_json::from_value(request).map_err(|e| not_a_request(&e))?;
    let to_value = |answer| serde_json::to_value(answer).expect("plain fields serialize");
    Ok(work(&request).map(to_value))
}

fn not_a_request(what: &impl std::fmt::Display) -> Error {
    Error::Usage {
        message: format!("not a request to tokenize: {what}"),
        hint: "`__tokenize` is started by ounce itself".to_owned(),
    }
}
