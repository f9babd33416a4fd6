//! Who calls: bearer tokens, one per node.
//!
//! A token is a JWT (RFC 7519, HS256) of `{node, aud, iat}`, signed with a key that never leaves the state folder. It
//! lies in a 0600 file `tokens/<node>`; taking that file away, or making a new token, revokes it.

use std::{
    fs, io,
    io::{Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{constant_time::verify_slices_are_equal, hmac};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tonic::metadata::MetadataMap;

use weft_runtime::durable;

use crate::objects::is_object_name;

/// Whom tokens are for.
pub const AUDIENCE: &str = "weft-operator";
const MAX_TOKEN: usize = 4096;
const HEADER: &str = r#"{"alg":"HS256","typ":"JWT"}"#;

/// Why tokens cannot be made or checked.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// A file of the state folder cannot be used.
    #[error("{path}: {source}; --state-dir must be a folder that this user can write")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The key file is not one.
    #[error(
        "{0} holds no key of 32 bytes, or others than its owner can read it; move it away and make new tokens"
    )]
    BadKey(PathBuf),
    /// The name cannot be a node's.
    #[error("{0:?} is no node's name; use a-z, 0-9, '-' and '.'")]
    BadNode(String),
}

/// Says who an agent is, by its bearer token.
pub trait Authenticator: Send + Sync + std::fmt::Debug {
    /// The node that a token proves.
    ///
    /// # Errors
    /// When it proves none, or that cannot be told now.
    fn node<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<String, Refused>>;
}

/// The bearer token of a call (RFC 6750, section 2.1).
///
/// # Errors
/// When there is none.
pub fn bearer(metadata: &MetadataMap) -> Result<&str, Refused> {
    let header = metadata.get("authorization").ok_or(Refused::Missing)?;
    let header = header.to_str().map_err(|_| Refused::Invalid)?;
    let (scheme, token) = header.split_once(' ').ok_or(Refused::Missing)?;
    if scheme.eq_ignore_ascii_case("bearer") { Ok(token.trim()) } else { Err(Refused::Missing) }
}

/// Why a caller is not let in. What exactly is wrong is for the log, not for the caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is known who calls, and that may not do this.
    #[error("{0}")]
    Forbidden(String),
    /// There is no `authorization: Bearer` header.
    #[error("the call carries no bearer token")]
    Missing,
    /// It is not a token of this mesh.
    #[error("the token is not one of this operator's; make one with `weft-operator token --node NAME`")]
    Invalid,
    /// It was one.
    #[error("the token was replaced or taken away; make one with `weft-operator token --node NAME`")]
    Revoked,
    /// It proves something else than an agent's node.
    #[error("{0}")]
    NoAgent(&'static str),
    /// Nobody can tell now.
    #[error("{0}")]
    Unavailable(String),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Claims {
    node: String,
    aud: String,
    iat: u64,
}

/// Makes and checks tokens.
#[derive(Debug)]
pub struct Tokens {
    key: hmac::Key,
    dir: PathBuf,
}

impl Tokens {
    /// Opens the state folder's key, or makes one.
    ///
    /// # Errors
    /// When the folder cannot be used or holds something else as key.
    pub fn open_or_create(state: &Path) -> Result<Self, TokenError> {
        let dir = state.join("tokens");
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| TokenError::Io { path, source }
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(failed(&dir))?;
        let path = state.join("token.key");
        if !path.exists() {
            // Written apart and linked into place, so that two processes that start together agree on one key.
            let apart = state.join(format!(".token.key.{:016x}", rand::random::<u64>()));
            write_private(&apart, &rand::random::<[u8; 32]>()).map_err(failed(&apart))?;
            let linked = fs::hard_link(&apart, &path);
            fs::remove_file(&apart).map_err(failed(&apart))?;
            match linked {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(failed(&path)(error));
                }
                _ => {}
            }
        }
        let key = fs::read(&path).map_err(failed(&path))?;
        let mode = fs::metadata(&path).map_err(failed(&path))?.permissions().mode();
        if key.len() != 32 || mode & 0o077 != 0 {
            return Err(TokenError::BadKey(path));
        }
        Ok(Self { key: hmac::Key::new(hmac::HMAC_SHA256, &key), dir })
    }

    /// Makes a node's token and writes it into its file, which replaces an earlier one. Returns the file's path.
    ///
    /// # Errors
    /// When the name is not a node's or the file cannot be written.
    pub fn issue(&self, node: &str) -> Result<PathBuf, TokenError> {
        if !is_object_name(node) {
            return Err(TokenError::BadNode(node.chars().take(80).collect()));
        }
        let iat = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let claims = Claims { node: node.into(), aud: AUDIENCE.into(), iat };
        let claims = serde_json::to_vec(&claims).unwrap_or_default();
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(HEADER), URL_SAFE_NO_PAD.encode(claims));
        let tag = hmac::sign(&self.key, signed.as_bytes());
        let token = format!("{signed}.{}\n", URL_SAFE_NO_PAD.encode(tag));
        let path = self.dir.join(node);
        match durable::replace(&path, token.as_bytes(), 0o600) {
            Ok(()) => Ok(path),
            Err(source) => Err(TokenError::Io { path, source }),
        }
    }

    fn check(&self, token: &str) -> Result<String, Refused> {
        if token.len() > MAX_TOKEN {
            return Err(Refused::Invalid);
        }
        let (signed, tag) = token.rsplit_once('.').ok_or(Refused::Invalid)?;
        let tag = URL_SAFE_NO_PAD.decode(tag).map_err(|_| Refused::Invalid)?;
        // Constant in time; nothing of the token is looked into before it holds.
        hmac::verify(&self.key, signed.as_bytes(), &tag).map_err(|_| Refused::Invalid)?;
        let (header, claims) = signed.split_once('.').ok_or(Refused::Invalid)?;
        if header != URL_SAFE_NO_PAD.encode(HEADER) {
            return Err(Refused::Invalid);
        }
        let claims = URL_SAFE_NO_PAD.decode(claims).map_err(|_| Refused::Invalid)?;
        let claims: Claims = serde_json::from_slice(&claims).map_err(|_| Refused::Invalid)?;
        if claims.aud != AUDIENCE || !is_object_name(&claims.node) {
            return Err(Refused::Invalid);
        }
        // A few hundred bytes of a local folder: not worth a thread of its own.
        let path = self.dir.join(&claims.node);
        let file = fs::File::open(&path).map_err(|_| Refused::Revoked)?;
        let mode = file.metadata().map_err(|_| Refused::Revoked)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            tracing::warn!(
                "{}: others than its owner can use this token (mode {mode:04o}), so it counts no more; make a new one with `weft-operator token --node {}`",
                path.display(),
                claims.node
            );
            return Err(Refused::Revoked);
        }
        let mut kept = Vec::new();
        file.take(MAX_TOKEN as u64).read_to_end(&mut kept).map_err(|_| Refused::Revoked)?;
        verify_slices_are_equal(kept.trim_ascii(), token.as_bytes()).map_err(|_| Refused::Revoked)?;
        Ok(claims.node)
    }
}

impl Authenticator for Tokens {
    fn node<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<String, Refused>> {
        Box::pin(std::future::ready(self.check(token)))
    }
}

fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(path: &Path) -> String {
        fs::read_to_string(path).unwrap().trim().to_owned()
    }

    #[test]
    fn a_token_proves_its_node_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open_or_create(dir.path()).unwrap();
        let path = tokens.issue("node-a").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let good = token(&path);
        assert_eq!(tokens.check(&good), Ok("node-a".into()));
        // Another process over the same folder takes it too.
        assert_eq!(Tokens::open_or_create(dir.path()).unwrap().check(&good), Ok("node-a".into()));

        let claims = URL_SAFE_NO_PAD.encode(r#"{"node":"node-b","aud":"weft-operator","iat":1}"#);
        let parts: Vec<&str> = good.split('.').collect();
        for bad in [
            format!("{}.{claims}.{}", parts[0], parts[2]),
            format!("{}.{}.", parts[0], parts[1]),
            format!("{}.{}.{}", parts[0], parts[1], URL_SAFE_NO_PAD.encode([0; 32])),
            String::new(),
            "..".into(),
            "a".repeat(MAX_TOKEN + 1),
        ] {
            assert_eq!(tokens.check(&bad), Err(Refused::Invalid), "{bad}");
        }
    }

    #[test]
    fn another_mesh_or_audience_is_refused() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let tokens = Tokens::open_or_create(one.path()).unwrap();
        let foreign = token(&Tokens::open_or_create(two.path()).unwrap().issue("node-a").unwrap());
        tokens.issue("node-a").unwrap();
        assert_eq!(tokens.check(&foreign), Err(Refused::Invalid));
        let claims = URL_SAFE_NO_PAD.encode(r#"{"node":"node-a","aud":"else","iat":1}"#);
        let signed = format!("{}.{claims}", URL_SAFE_NO_PAD.encode(HEADER));
        let tag = URL_SAFE_NO_PAD.encode(hmac::sign(&tokens.key, signed.as_bytes()));
        assert_eq!(tokens.check(&format!("{signed}.{tag}")), Err(Refused::Invalid));
    }

    #[test]
    fn a_token_that_was_replaced_or_removed_is_revoked() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open_or_create(dir.path()).unwrap();
        let path = tokens.issue("node-a").unwrap();
        let old = token(&path);
        fs::remove_file(&path).unwrap();
        assert_eq!(tokens.check(&old), Err(Refused::Revoked));
        assert!(tokens.issue("../a").is_err());
    }

    #[test]
    fn a_token_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open_or_create(dir.path()).unwrap();
        let path = tokens.issue("node-a").unwrap();
        let good = token(&path);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(tokens.check(&good), Err(Refused::Revoked));
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        Tokens::open_or_create(dir.path()).unwrap();
        fs::set_permissions(dir.path().join("token.key"), fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Tokens::open_or_create(dir.path()), Err(TokenError::BadKey(_))));
    }
}
