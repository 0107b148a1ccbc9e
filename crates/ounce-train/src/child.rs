//! A child process that works for this one, so that its memory is never ours.
//!
//! The pages that a tokenizer leaves behind would stay resident for the whole run. So the parent starts its own program
//! file as `__tokenize`, sends one piece of work as JSON on stdin and reads one answer from stdout. Which kinds of work
//! there are is known to those who ask and to `worker.rs`.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::message_and_hint;
use crate::{Error, ErrorClass, Observer, Result};

/// Between two looks at the child.
const POLL_EVERY: Duration = Duration::from_millis(3);

/// What a child is started for.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Work<T> {
    pub(crate) kind: String,
    pub(crate) request: T,
}

/// An answer, or what went wrong in the child.
#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    Done(Value),
    Failed { input: bool, message: String, hint: String },
}

/// What the child writes of an answer, or of what went wrong.
pub(crate) fn reply(done: Result<Value>) -> String {
    let reply = match done {
        Ok(answer) => Reply::Done(answer),
        Err(e) => {
            let (message, hint) = message_and_hint(&e);
            Reply::Failed { input: e.class() != ErrorClass::Files, message, hint }
        }
    };
    serde_json::to_string(&reply).expect("plain fields serialize")
}

/// A child process at work. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct Working {
    child: Child,
    stdout: Option<ChildStdout>,
    worker: PathBuf,
}

impl Working {
    /// Starts `worker` on some work.
    ///
    /// # Errors
    /// A program that cannot be started.
    pub(crate) fn start(worker: &Path, kind: &str, request: &impl Serialize) -> Result<Self> {
        let mut child = Command::new(worker)
            .arg("__tokenize")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| Error::file(worker, &e))?;
        let work = Work { kind: kind.to_owned(), request };
        let text = serde_json::to_string(&work).expect("plain fields serialize");
        // A child that dies early closes the pipe; its status below says more than the pipe's error.
        let _ = child.stdin.take().expect("stdin is piped").write_all(text.as_bytes());
        let stdout = child.stdout.take();
        Ok(Self { child, stdout, worker: worker.to_path_buf() })
    }

    /// Waits for the answer.
    ///
    /// # Errors
    /// What went wrong in the child; a request to stop, after which it is killed.
    pub(crate) fn finish<T: DeserializeOwned>(mut self, observer: &dyn Observer) -> Result<T> {
        let mut stdout = self.stdout.take().expect("the reply is read once");
        let (child, mut said) = (&mut self.child, Vec::new());
        let status = std::thread::scope(|scope| {
            // Read beside the wait: a long answer would fill the pipe.
            scope.spawn(|| stdout.read_to_end(&mut said));
            wait(child, observer)
        });
        let Some(status) = status.map_err(|e| Error::file(&self.worker, &e))? else {
            return Err(Error::Interrupted { step: 0, checkpoint: None });
        };
        // A signal to the whole group may end the child before it listens, and before we have heard of it.
        if status.signal().is_some() {
            std::thread::sleep(POLL_EVERY);
            if observer.stop_requested() {
                return Err(Error::Interrupted { step: 0, checkpoint: None });
            }
        }
        match serde_json::from_slice(&said) {
            Ok(Reply::Failed { input: true, message, hint }) => Err(Error::Input { message, hint }),
            Ok(Reply::Failed { input: false, message, hint }) => {
                Err(Error::Files { message, hint })
            }
            Ok(Reply::Done(answer)) if status.success() => {
                // The program file may have been replaced since this process began.
                serde_json::from_value(answer).map_err(|e| Error::Files {
                    message: format!(
                        "{}: not the answer that was asked for: {e}",
                        self.worker.display()
                    ),
                    hint: "if ounce was replaced while it ran, start it again".to_owned(),
                })
            }
            _ => Err(Error::Files {
                message: format!("the tokenizing process ended early ({status})"),
                hint: "if it was killed, the machine may be short of memory".to_owned(),
            }),
        }
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        // One that has ended cannot be killed, and that is as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The child's end; `None` where it was killed because the observer asked to stop.
fn wait(child: &mut Child, observer: &dyn Observer) -> std::io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if observer.stop_requested() {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(POLL_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::Silent;

    #[test]
    fn a_child_that_answers_something_else_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let worker = dir.path().join("worker");
        for (says, told) in [
            (r#"{"Done": 5}"#, "worker: not the answer that was asked for"),
            ("nothing", "the tokenizing process ended early"),
            (r#"{"Failed": {"input": false, "message": "m", "hint": "h"}}"#, "m\nhint: h"),
        ] {
            std::fs::write(&worker, format!("#!/bin/sh\ncat > /dev/null\necho '{says}'\n"))
                .unwrap();
            std::fs::set_permissions(&worker, std::fs::Permissions::from_mode(0o755)).unwrap();
            let child = Working::start(&worker, "kind", &1).unwrap();
            let error = child.finish::<String>(&Silent).unwrap_err();
            assert_eq!(error.class(), ErrorClass::Files);
            assert!(error.to_string().contains(told), "{error}");
        }
    }
}
