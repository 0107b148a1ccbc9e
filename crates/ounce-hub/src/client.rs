//! Requests to a hub.
//!
//! The token goes to the hub alone: where it sends us elsewhere (to the storage of large files), it is not sent along.

use std::io::Read;
use std::time::Duration;

use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;
use ureq::{Agent, Body};

use crate::error::HubError;

/// Longest answer about a model.
const MAX_ANSWER_BYTES: u64 = 16 << 20;
/// How long a connection or the beginning of an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A hub.
pub(crate) struct Client {
    agent: Agent,
    token: Option<String>,
}

impl Client {
    pub(crate) fn new(endpoint: &str, token: Option<String>) -> Self {
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(PATIENCE))
            .timeout_recv_response(Some(PATIENCE))
            // One that stalls is asked for again, from where it stopped.
            .timeout_recv_body(Some(10 * PATIENCE))
            .user_agent(concat!("ounce/", env!("CARGO_PKG_VERSION")));
        // A hub on this machine is not behind a proxy.
        if endpoint.starts_with("http://127.0.0.1") || endpoint.starts_with("http://localhost") {
            config = config.proxy(None);
        }
        Self { agent: config.build().into(), token }
    }

    /// A whole answer.
    ///
    /// # Errors
    /// As [`Self::get_from`]; an answer that is too long.
    pub(crate) fn get(&self, url: &str) -> Result<Vec<u8>, HubError> {
        let (response, _) = self.get_from(url, 0)?;
        let mut bytes = Vec::new();
        let reader = response.into_body().into_reader();
        let read = reader.take(MAX_ANSWER_BYTES + 1).read_to_end(&mut bytes);
        read.map_err(|e| network(url, &e))?;
        if bytes.len() as u64 > MAX_ANSWER_BYTES {
            let what = format!("the answer is longer than {MAX_ANSWER_BYTES} bytes");
            return Err(HubError::BadAnswer { url: url.to_owned(), what });
        }
        Ok(bytes)
    }

    /// The answer from byte `start` on, if the hub can do that, or from the beginning; and which of them.
    ///
    /// # Errors
    /// No such thing, no permission, a failing network.
    pub(crate) fn get_from(
        &self,
        url: &str,
        start: u64,
    ) -> Result<(Response<Body>, u64), HubError> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if start > 0 {
            request = request.header("Range", format!("bytes={start}-"));
        }
        let response = request.call().map_err(|e| network(url, &e))?;
        let url = url.to_owned();
        match response.status().as_u16() {
            200 => Ok((response, 0)),
            206 if is_from(&response, start) => Ok((response, start)),
            // Nothing there to go on with.
            416 if start > 0 => self.get_from(&url, 0),
            404 => Err(HubError::NotFound { url }),
            status @ (401 | 403) => Err(HubError::Unauthorized { url, status }),
            status => Err(HubError::BadAnswer { url, what: format!("the hub answers {status}") }),
        }
    }
}

/// Whether a partial answer begins at byte `start`.
fn is_from(response: &Response<Body>, start: u64) -> bool {
    let range = response.headers().get("content-range").and_then(|value| value.to_str().ok());
    range.is_some_and(|range| range.starts_with(&format!("bytes {start}-")))
}

pub(crate) fn network(url: &str, e: &dyn std::fmt::Display) -> HubError {
    HubError::Network { url: url.to_owned(), what: e.to_string() }
}
