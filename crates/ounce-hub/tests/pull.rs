//! Fetching from a hub on this machine, which does what hubs and networks do.

#![expect(clippy::unwrap_used, reason = "test helpers panic like the tests that call them")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use ounce_hub::{HubError, PullRecord, PullSettings, pull};
use ounce_io::{cached_snapshot, hub_name};
use serde_json::json;
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What a hub does wrong.
#[derive(Debug, Default)]
struct Faults {
    /// Connections break after so many bytes of a file; so often.
    breaks: Option<(usize, usize)>,
    /// It knows nothing of ranges.
    has_no_ranges: bool,
    /// It sends other bytes than it announced.
    lies: bool,
    /// It announces a length that no disk has.
    is_huge: bool,
}

/// A hub with one model.
struct Hub {
    endpoint: String,
    faults: Arc<Mutex<Faults>>,
    /// Path and range of every request.
    requests: Arc<Mutex<Vec<String>>>,
}

fn files() -> Vec<(&'static str, Vec<u8>)> {
    let weights: Vec<u8> = (0..300_000_u32).flat_map(|i| (i * 7919).to_le_bytes()).collect();
    vec![
        ("config.json", b"{\"model_type\": \"llama\"}".to_vec()),
        ("model.safetensors", weights),
        ("pytorch_model.bin", b"pickle".to_vec()),
        ("evil/../../x.json", b"{}".to_vec()),
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, b| text + &format!("{b:02x}"))
}

impl Hub {
    fn start(token: Option<&'static str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let faults = Arc::new(Mutex::new(Faults::default()));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (f, r) = (faults.clone(), requests.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(stream.unwrap(), token, &f, &r);
            }
        });
        Self { endpoint, faults, requests }
    }

    fn settings(&self, dir: &Path, name: &str) -> PullSettings {
        PullSettings {
            name: hub_name(Path::new(name)).unwrap(),
            files: Vec::new(),
            endpoint: self.endpoint.clone(),
            token: None,
            hub_dir: dir.into(),
        }
    }

    fn pull(&self, dir: &Path, name: &str) -> Result<PullRecord, HubError> {
        pull(&self.settings(dir, name), &mut |_| true)
    }

    /// Requests since the last time.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }
}

/// Answers one request.
fn serve(
    mut stream: TcpStream,
    token: Option<&str>,
    faults: &Mutex<Faults>,
    requests: &Mutex<Vec<String>>,
) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    let path = first.split(' ').nth(1).unwrap().to_owned();
    let headers: Vec<String> =
        lines.map(Result::unwrap).take_while(|line| !line.is_empty()).collect();
    let header = |name: &str| {
        let is_it = |h: &&String| h.to_lowercase().starts_with(&format!("{name}: "));
        headers.iter().find(is_it).map(|h| h[name.len() + 2..].to_owned())
    };
    let range = header("range");
    requests.lock().unwrap().push(format!("{path} {}", range.clone().unwrap_or_default()));
    let mut faults = faults.lock().unwrap();
    let mut send = |status: &str, more: &str, announced: usize, body: &[u8]| {
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {announced}\r\nConnection: close\r\n{more}\r\n"
        );
        // The client may have gone already.
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    };
    if token.is_some_and(|token| header("authorization") != Some(format!("Bearer {token}"))) {
        return send("401 Unauthorized", "", 0, b"");
    }
    if path.starts_with("/api/models/some/one/revision/main") {
        let about = |(name, content): &(&str, Vec<u8>)| {
            let sha256 = hex(&Sha256::digest(content));
            let size = if faults.is_huge { 1 << 60 } else { content.len() };
            json!({"rfilename": name, "lfs": {"sha256": sha256, "size": size}})
        };
        let siblings: Vec<_> = files().iter().map(about).collect();
        let body = json!({"sha": COMMIT, "siblings": siblings}).to_string();
        return send("200 OK", "", body.len(), body.as_bytes());
    }
    let name = path.strip_prefix(&format!("/some/one/resolve/{COMMIT}/"));
    let Some((_, mut body)) = files().into_iter().find(|(n, _)| Some(*n) == name) else {
        return send("404 Not Found", "", 0, b"");
    };
    if faults.lies {
        body[0] ^= 1;
    }
    let start = range.filter(|_| !faults.has_no_ranges).map_or(0, |range| {
        range.trim_start_matches("bytes=").trim_end_matches('-').parse::<usize>().unwrap()
    });
    let part = &body[start..];
    let most = match &mut faults.breaks {
        Some((n_bytes, n_times)) if *n_times > 0 && part.len() > *n_bytes => {
            *n_times -= 1;
            *n_bytes
        }
        _ => part.len(),
    };
    let (status, more) = if start == 0 {
        ("200 OK", String::new())
    } else {
        let end = body.len() - 1;
        ("206 Partial Content", format!("Content-Range: bytes {start}-{end}/{}\r\n", body.len()))
    };
    send(status, &more, part.len(), &part[..most]);
}

/// Checks that the model is in the cache, and nothing else.
fn assert_whole(dir: &Path, record: &PullRecord) {
    let snapshot = cached_snapshot(dir, &hub_name(Path::new("some/one")).unwrap()).unwrap();
    assert_eq!(snapshot, record.path);
    for (name, content) in &files()[..2] {
        assert!(fs::read(snapshot.join(name)).unwrap() == *content, "{name}");
        assert!(snapshot.join(name).symlink_metadata().unwrap().is_symlink());
    }
    assert_eq!(fs::read_dir(&snapshot).unwrap().count(), 2);
    assert_eq!(fs::read_dir(dir.join("models--some--one/blobs")).unwrap().count(), 2);
}

#[test]
fn a_model_comes_into_the_cache_once() {
    let (hub, dir) = (Hub::start(None), tempfile::tempdir().unwrap());
    let record = hub.pull(dir.path(), "some/one").unwrap();
    assert_whole(dir.path(), &record);
    assert_eq!(record.left_out, ["pytorch_model.bin", "evil/../../x.json"]);
    assert_eq!(record.fetched_bytes, 1_200_000 + 23);
    hub.requests();
    assert_eq!(hub.pull(dir.path(), "some/one").unwrap().fetched_bytes, 0);
    assert_eq!(hub.requests().len(), 1, "only the listing is asked for");
}

#[test]
fn a_broken_transfer_goes_on_where_it_stopped() {
    let (hub, dir) = (Hub::start(None), tempfile::tempdir().unwrap());
    hub.faults.lock().unwrap().breaks = Some((500_000, 2));
    let record = hub.pull(dir.path(), "some/one").unwrap();
    assert_whole(dir.path(), &record);
    let ranges: Vec<String> =
        hub.requests().into_iter().filter(|r| r.contains("model.safetensors")).collect();
    assert_eq!(ranges.len(), 3);
    assert!(ranges[1].ends_with("bytes=500000-") && ranges[2].ends_with("bytes=1000000-"));
    assert_eq!(record.fetched_bytes, 1_200_000 + 23, "nothing came twice");
}

#[test]
fn another_run_goes_on_with_what_an_interrupted_one_left() {
    let (hub, dir) = (Hub::start(None), tempfile::tempdir().unwrap());
    let stopped = pull(&hub.settings(dir.path(), "some/one"), &mut |p| p.n_bytes < 400_000);
    assert!(matches!(stopped, Err(HubError::Interrupted)), "{stopped:?}");
    let name = hub_name(Path::new("some/one")).unwrap();
    assert!(cached_snapshot(dir.path(), &name).is_err(), "half a model is none");
    hub.requests();
    let record = hub.pull(dir.path(), "some/one").unwrap();
    assert_whole(dir.path(), &record);
    assert!(record.fetched_bytes < 1_200_000);
    assert!(hub.requests().iter().any(|r| r.contains("bytes=")));
}

/// Two that append to one file would destroy what both have fetched.
#[test]
fn a_pull_beside_another_one_is_refused_and_touches_nothing() {
    let (hub, dir) = (Hub::start(None), tempfile::tempdir().unwrap());
    let settings = hub.settings(dir.path(), "some/one");
    let mut refused = None;
    // While the first is in the middle of its large file, a second one begins.
    let record = pull(&settings, &mut |p| {
        if p.n_bytes > 400_000 && refused.is_none() {
            refused = Some(hub.pull(dir.path(), "some/one").unwrap_err().to_string());
        }
        true
    });
    assert_whole(dir.path(), &record.unwrap());
    let refused = refused.expect("a second pull was tried");
    assert!(refused.contains("another pull is fetching it"), "{refused}");
}

#[test]
fn a_hub_without_ranges_sends_all_of_it_again() {
    let (hub, dir) = (Hub::start(None), tempfile::tempdir().unwrap());
    *hub.faults.lock().unwrap() =
        Faults { breaks: Some((500_000, 1)), has_no_ranges: true, ..Faults::default() };
    assert_whole(dir.path(), &hub.pull(dir.path(), "some/one").unwrap());
}

#[test]
fn a_network_that_never_delivers_is_told_and_what_came_is_kept() {
    let (hub, dir) = (Hub::start(None), tempfile::tempdir().unwrap());
    hub.faults.lock().unwrap().breaks = Some((0, usize::MAX));
    let error = hub.pull(dir.path(), "some/one").unwrap_err();
    assert!(matches!(error, HubError::Network { .. }), "{error}");
    assert!(error.to_string().contains("hint: check the network and run the same command again"));
}

#[test]
fn a_wrong_checksum_is_refused_and_nothing_is_kept() {
    let (hub, dir) = (Hub::start(None), tempfile::tempdir().unwrap());
    hub.faults.lock().unwrap().lies = true;
    let error = hub.pull(dir.path(), "some/one").unwrap_err();
    assert!(matches!(error, HubError::Checksum { .. }), "{error}");
    assert!(error.to_string().starts_with("config.json: its checksum is "), "{error}");
    assert_eq!(fs::read_dir(dir.path().join("models--some--one/blobs")).unwrap().count(), 0);
    hub.faults.lock().unwrap().lies = false;
    assert_whole(dir.path(), &hub.pull(dir.path(), "some/one").unwrap());
}

#[test]
fn what_is_not_there_or_not_ours_or_too_large_is_told_apart() {
    let (hub, dir) = (Hub::start(None), tempfile::tempdir().unwrap());
    let error = hub.pull(dir.path(), "some/other").unwrap_err();
    assert!(matches!(error, HubError::NotFound { .. }), "{error}");
    hub.faults.lock().unwrap().is_huge = true;
    let error = hub.pull(dir.path(), "some/one").unwrap_err();
    assert!(matches!(error, HubError::NoRoom { .. }), "{error}");

    let closed = Hub::start(Some("secret"));
    let error = closed.pull(dir.path(), "some/one").unwrap_err();
    assert!(matches!(error, HubError::Unauthorized { status: 401, .. }), "{error}");
    let mut settings = closed.settings(dir.path(), "some/one");
    settings.token = Some("secret".to_owned());
    assert_whole(dir.path(), &pull(&settings, &mut |_| true).unwrap());
}

#[test]
fn single_files_can_be_chosen() {
    let (hub, dir) = (Hub::start(None), tempfile::tempdir().unwrap());
    let mut settings = hub.settings(dir.path(), "some/one");
    settings.files = vec!["config.json".to_owned()];
    assert_eq!(pull(&settings, &mut |_| true).unwrap().files, ["config.json"]);
    settings.files = vec!["pytorch_model.bin".to_owned()];
    let error = pull(&settings, &mut |_| true).unwrap_err();
    assert!(error.to_string().contains("hint: it has config.json, model.safetensors"), "{error}");
}
