//! Answers: whole, read as they come, or none.

use std::fmt;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde_json::Value;

use crate::wait::PATIENCE;

/// Why there is no answer.
#[derive(Debug)]
pub struct Broken(String);

impl Broken {
    /// That there is none for this reason.
    #[must_use]
    pub fn of(why: &str) -> Self {
        Self(why.to_owned())
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Broken {}

pub(super) fn broken(error: impl fmt::Debug) -> Broken {
    Broken(format!("{error:?}"))
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Status.
    pub status: u16,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
}

/// An answer whose body is read as it comes.
pub struct Streaming {
    /// Status.
    pub status: u16,
    /// Headers.
    pub headers: HeaderMap,
    pub(super) body: Incoming,
    pub(super) read: BytesMut,
}

impl Answer {
    /// This answer, if its status is 200.
    ///
    /// # Errors
    /// [`Broken`] with another status.
    pub fn ok(self) -> Result<Self, Broken> {
        if self.status == 200 {
            Ok(self)
        } else {
            Err(Broken(format!("status {} {}", self.status, self.text().trim())))
        }
    }

    /// Body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Body as JSON; `null` where it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// A header's first value, where it is text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The filter's reason code.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        self.header("x-pd-reason")
    }
}

impl Streaming {
    /// The next piece of the body; `None` at its end.
    ///
    /// # Errors
    /// [`Broken`] when the body breaks off.
    pub async fn piece(&mut self) -> Result<Option<Bytes>, Broken> {
        let next = async {
            while let Some(frame) = self.body.frame().await {
                if let Ok(data) = frame.map_err(broken)?.into_data() {
                    return Ok(Some(data));
                }
            }
            Ok(None)
        };
        tokio::time::timeout(PATIENCE, next).await.map_err(broken)?
    }

    /// The next server-sent event with its empty line; `None` at the end.
    ///
    /// # Errors
    /// [`Broken`] when the body breaks off.
    pub async fn event(&mut self) -> Result<Option<Bytes>, Broken> {
        loop {
            if let Some(end) = self.read.windows(2).position(|two| two == b"\n\n") {
                return Ok(Some(self.read.split_to(end + 2).freeze()));
            }
            match self.piece().await? {
                Some(piece) => self.read.extend_from_slice(&piece),
                None => return Ok(None),
            }
        }
    }

    /// All that is left of the body.
    ///
    /// # Errors
    /// [`Broken`] when the body breaks off.
    pub async fn rest(mut self) -> Result<Bytes, Broken> {
        while let Some(piece) = self.piece().await? {
            self.read.extend_from_slice(&piece);
        }
        Ok(self.read.freeze())
    }
}
