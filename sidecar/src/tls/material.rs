//! Our certificate, key and authorities, read again whenever the files change.
//!
//! Before every handshake the files' identities (inode, size, times) are compared with those that were loaded; that
//! follows both a rename in place and the symlink swap of a mounted Secret. Files that cannot be used (half written, a
//! key without its certificate) leave the former material in force, and the reason is reported: a bad rotation must
//! not cut a working pair.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, Mutex},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    ALPN_HTTP2, TlsError,
    verify::{DialerVerifier, ListenerVerifier, identity_of},
};
use crate::{config::TlsFiles, identity::Identity};

/// Largest PEM file read, bytes: a bundle of fifty authorities is far smaller.
const PEM_BYTES_MAX: u64 = 1 << 20;

/// The pair's TLS material, shared by the listener and the dialer.
pub struct Tls {
    files: TlsFiles,
    own: Identity,
    state: Mutex<State>,
}

struct State {
    loaded: Arc<Loaded>,
    stamp: Stamp,
    /// Why newer files are not in force.
    reload_error: Option<String>,
    reloads: u64,
}

/// Configurations made of one consistent reading of the files.
pub(super) struct Loaded {
    pub server: Arc<ServerConfig>,
    pub client: Arc<ClientConfig>,
    not_before_unix_seconds: i64,
    not_after_unix_seconds: i64,
}

/// For reports and conditions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsStatus {
    pub not_before_unix_seconds: i64,
    pub not_after_unix_seconds: i64,
    /// Newer files exist and cannot be used; the former ones are in force.
    pub reload_error: Option<String>,
    pub reloads: u64,
}

/// Which versions of the three files these are.
type Stamp = [Option<(u64, u64, u64, i64, i64, i64)>; 3];

impl Tls {
    /// Reads the files. Refuses material that could never work: unreadable, of another pair or site, a key that does not fit.
    /// An expired certificate is *not* refused here (the peer will, and [`Tls::status`] says so): a VM's disks are
    /// served whatever the date (I8).
    pub fn load(files: TlsFiles, own: Identity) -> Result<Arc<Tls>, TlsError> {
        let stamp = stamp(&files);
        let loaded = Arc::new(read(&files, &own)?);
        let state = Mutex::new(State { loaded, stamp, reload_error: None, reloads: 0 });
        Ok(Arc::new(Tls { files, own, state }))
    }

    pub fn identity(&self) -> &Identity {
        &self.own
    }

    pub fn status(&self) -> TlsStatus {
        let state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        TlsStatus {
            not_before_unix_seconds: state.loaded.not_before_unix_seconds,
            not_after_unix_seconds: state.loaded.not_after_unix_seconds,
            reload_error: state.reload_error.clone(),
            reloads: state.reloads,
        }
    }

    /// The material in force, after a look at the files. Blocking file access runs apart from the runtime's threads.
    pub(super) async fn current(self: &Arc<Self>) -> Arc<Loaded> {
        let this = Arc::clone(self);
        match tokio::task::spawn_blocking(move || this.refresh()).await {
            Ok(loaded) => loaded,
            // The runtime is shutting down; whoever asked is about to end too.
            Err(_) => Arc::clone(&self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).loaded),
        }
    }

    /// Reads the files again if they changed.
    pub(super) fn refresh(&self) -> Arc<Loaded> {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let stamp = stamp(&self.files);
        if stamp != state.stamp {
            match read(&self.files, &self.own) {
                Ok(loaded) => {
                    state.loaded = Arc::new(loaded);
                    // Taken before reading: a change in between is seen as another change.
                    state.stamp = stamp;
                    state.reload_error = None;
                    state.reloads += 1;
                    tracing::info!(certificate = %self.files.certificate.display(), "TLS files changed and are in force");
                }
                Err(error) => {
                    let text = error.to_string();
                    if state.reload_error.as_deref() != Some(&text) {
                        tracing::warn!(error = %text, "TLS files changed and cannot be used; the former ones stay in force");
                    }
                    state.reload_error = Some(text);
                }
            }
        }
        Arc::clone(&state.loaded)
    }
}

fn stamp(files: &TlsFiles) -> Stamp {
    [&files.ca, &files.certificate, &files.key].map(|path| {
        let found = fs::metadata(path).ok()?;
        let changed = found.ctime().wrapping_mul(1_000_000_000).wrapping_add(found.ctime_nsec());
        Some((found.dev(), found.ino(), found.size(), found.mtime(), found.mtime_nsec(), changed))
    })
}

fn read(files: &TlsFiles, own: &Identity) -> Result<Loaded, TlsError> {
    let authorities = certificates("tls.ca", &files.ca)?;
    let chain = certificates("tls.certificate", &files.certificate)?;
    let key = key(&files.key)?;
    let refuse = |found: String, expected: String, remedy| TlsError::Material {
        field: "tls.certificate",
        file: files.certificate.clone(),
        found,
        expected,
        remedy,
    };
    let found = identity_of(&chain[0]).map_err(|why| {
        refuse(why.to_string(), own.to_string(), "issue it with `watari-sidecar pki` or the operator")
    })?;
    if found != *own {
        return Err(refuse(
            found.to_string(),
            own.to_string(),
            "use this site's certificate, or correct `pair.id` and `site`",
        ));
    }
    let (_, parsed) = X509Certificate::from_der(&chain[0])
        .map_err(|error| refuse(error.to_string(), "an X.509 certificate".to_owned(), "issue it anew"))?;
    let validity = parsed.validity();
    let (server, client) = configs(files, own, &authorities, &chain, &key)?;
    Ok(Loaded {
        server: Arc::new(server),
        client: Arc::new(client),
        not_before_unix_seconds: validity.not_before.timestamp(),
        not_after_unix_seconds: validity.not_after.timestamp(),
    })
}

fn configs(
    files: &TlsFiles,
    own: &Identity,
    authorities: &[CertificateDer<'static>],
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
) -> Result<(ServerConfig, ClientConfig), TlsError> {
    let material = |field, file: &Path, remedy| {
        let file = file.to_owned();
        move |error: String| TlsError::Material {
            field,
            file,
            found: error,
            expected: "material that fits together".to_owned(),
            remedy,
        }
    };
    let bad_ca = material("tls.ca", &files.ca, "give PEM certificates of the authorities");
    let bad_key = material("tls.key", &files.key, "give the private key that belongs to tls.certificate");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    let mut subjects = Vec::new();
    for authority in authorities {
        roots.add(authority.clone()).map_err(|error| bad_ca.clone()(error.to_string()))?;
        if let Ok((_, parsed)) = X509Certificate::from_der(authority) {
            subjects.push(parsed.subject().to_string());
        }
    }
    let (roots, named) = (Arc::new(roots), format!("{} ({})", files.ca.display(), subjects.join("; ")));
    let dialers = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
        .build()
        .map_err(|error| bad_ca.clone()(error.to_string()))?;
    let listeners = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider))
        .build()
        .map_err(|error| bad_ca(error.to_string()))?;
    let dialers = DialerVerifier { chain: dialers, pair: own.pair, authorities: named.clone() };
    let listeners = ListenerVerifier { chain: listeners, pair: own.pair, authorities: named };
    let server =
        server_config(provider.clone(), dialers, chain, key).map_err(|error| bad_key.clone()(error.to_string()))?;
    let client = client_config(provider, listeners, chain, key).map_err(|error| bad_key(error.to_string()))?;
    Ok((server, client))
}

fn server_config(
    provider: Arc<CryptoProvider>,
    dialers: DialerVerifier,
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(dialers))
        .with_single_cert(chain.to_vec(), key.clone_key())?;
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
    Ok(config)
}

fn client_config(
    provider: Arc<CryptoProvider>,
    listeners: ListenerVerifier,
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(listeners))
        .with_client_auth_cert(chain.to_vec(), key.clone_key())?;
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
    Ok(config)
}

fn certificates(field: &'static str, file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let refuse = |found: String| TlsError::Material {
        field,
        file: file.to_owned(),
        found,
        expected: "one or more PEM certificates".to_owned(),
        remedy: "make it with `watari-sidecar pki`, or mount the Secret",
    };
    let text = contents(file).map_err(|error| refuse(error.to_string()))?;
    let certificates: Vec<_> =
        CertificateDer::pem_slice_iter(&text).collect::<Result<_, _>>().map_err(|error| refuse(error.to_string()))?;
    if certificates.is_empty() {
        return Err(refuse("no certificate".to_owned()));
    }
    Ok(certificates)
}

fn key(file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let refuse = |found: String| TlsError::Material {
        field: "tls.key",
        file: file.to_owned(),
        found,
        expected: "a PEM private key".to_owned(),
        remedy: "make it with `watari-sidecar pki`, or mount the Secret",
    };
    let text = contents(file).map_err(|error| refuse(error.to_string()))?;
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| refuse(error.to_string()))
}

fn contents(file: &Path) -> io::Result<Vec<u8>> {
    use io::Read;
    let mut text = Vec::new();
    fs::File::open(file)?.take(PEM_BYTES_MAX).read_to_end(&mut text)?;
    Ok(text)
}
