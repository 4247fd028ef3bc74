//! Certificates for pairing two plain hosts by hand: one authority, one certificate for each site.
//!
//! In Kubernetes the operator issues and rotates certificates; this is the same shape made by one person at one desk.
//! Writes only new files, private ones readable by their owner alone; an existing file is never replaced, except that
//! `renew` replaces a site's certificate and key by renaming (which running sidecars then pick up).

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType, date_time_ymd, string::Ia5String,
};

use crate::identity::{Identity, PairId, SiteName};

/// How long the authority is good for: longer than a pairing by hand is likely to live.
pub const AUTHORITY_DAYS: u32 = 3650;
/// Default for a site; `renew` makes a new one.
pub const SITE_DAYS: u32 = 365;
/// Certificates begin this long before now, because two hosts' clocks differ.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);

#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("{}: found an existing file, expected none; remove it, or choose another --out", .0.display())]
    Exists(PathBuf),
    #[error("{}: {error}; check the folder and its permissions", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("cannot make the certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("{0}")]
    Invalid(String),
}

/// From when until when, in seconds since 1970.
#[derive(Clone, Copy, Debug)]
pub struct Validity {
    pub from_unix_seconds: u64,
    pub until_unix_seconds: u64,
}

impl Validity {
    /// From an hour ago for `days` days.
    pub fn days(days: u32) -> Validity {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Validity {
            from_unix_seconds: now.saturating_sub(CLOCK_SKEW).as_secs(),
            until_unix_seconds: (now + DAY * days).as_secs(),
        }
    }

    fn apply(self, params: &mut CertificateParams) {
        params.not_before = date_time_ymd(1970, 1, 1) + Duration::from_secs(self.from_unix_seconds);
        params.not_after = date_time_ymd(1970, 1, 1) + Duration::from_secs(self.until_unix_seconds);
    }
}

/// An authority that can issue certificates.
pub struct Authority {
    pub certificate_pem: String,
    pub key_pem: String,
}

/// A site's certificate and key.
pub struct Issued {
    pub certificate_pem: String,
    pub key_pem: String,
}

impl Authority {
    pub fn new(common_name: &str, validity: Validity) -> Result<Authority, PkiError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        validity.apply(&mut params);
        let certificate = params.self_signed(&key)?;
        Ok(Authority { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    /// A certificate for one site of a pair, good for both ends of a connection.
    pub fn issue(&self, identity: &Identity, server_names: &[String], validity: Validity) -> Result<Issued, PkiError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(server_names.to_vec())?;
        params.subject_alt_names.push(SanType::URI(Ia5String::try_from(identity.to_string())?));
        params.distinguished_name.push(DnType::CommonName, format!("watari site {}", identity.site));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        validity.apply(&mut params);
        let issuer = Issuer::from_ca_cert_pem(&self.certificate_pem, KeyPair::from_pem(&self.key_pem)?)?;
        let certificate = params.signed_by(&key, &issuer)?;
        Ok(Issued { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }
}

/// A new pair of two (or more) sites under `out`: `authority/` and a folder for each site. Returns what to do next.
pub fn new_pair(out: &Path, sites: &[SiteName], pair: Option<PairId>, days: u32) -> Result<String, PkiError> {
    if sites.len() < 2 || sites.iter().enumerate().any(|(index, site)| sites[..index].contains(site)) {
        return Err(PkiError::Invalid(
            "`--site`: found fewer than two different names, expected two or more".to_owned(),
        ));
    }
    let pair = match pair {
        Some(pair) => pair,
        None => random_pair()?,
    };
    let authority = Authority::new(&format!("watari pair {pair}"), Validity::days(AUTHORITY_DAYS))?;
    let folder = out.join("authority");
    make_folder(&folder)?;
    create(&folder.join("ca.crt"), authority.certificate_pem.as_bytes(), 0o644)?;
    create(&folder.join("ca.key"), authority.key_pem.as_bytes(), 0o600)?;
    for site in sites {
        let identity = Identity { pair, site: site.clone() };
        let issued = authority.issue(&identity, &[pair.server_name()], Validity::days(days))?;
        let folder = out.join(site.as_str());
        make_folder(&folder)?;
        create(&folder.join("ca.crt"), authority.certificate_pem.as_bytes(), 0o644)?;
        create(&folder.join("tls.crt"), issued.certificate_pem.as_bytes(), 0o644)?;
        create(&folder.join("tls.key"), issued.key_pem.as_bytes(), 0o600)?;
    }
    Ok(instructions(out, sites, pair, days))
}

/// Replaces the certificate and key of `site` under `out`, for the same pair.
pub fn renew(out: &Path, site: &SiteName, days: u32) -> Result<String, PkiError> {
    let read = |path: PathBuf| fs::read_to_string(&path).map_err(|error| io_error(&path, error));
    let authority = Authority {
        certificate_pem: read(out.join("authority/ca.crt"))?,
        key_pem: read(out.join("authority/ca.key"))?,
    };
    let folder = out.join(site.as_str());
    let former = read(folder.join("tls.crt"))?;
    let invalid = |why: String| PkiError::Invalid(format!("{}: {why}", folder.join("tls.crt").display()));
    let der = rustls::pki_types::pem::PemObject::from_pem_slice(former.as_bytes())
        .map_err(|error: rustls::pki_types::pem::Error| invalid(error.to_string()))?;
    let identity = crate::tls::verify::identity_of(&der).map_err(|error| invalid(error.to_string()))?;
    let issued = authority.issue(&identity, &[identity.pair.server_name()], Validity::days(days))?;
    for (name, text, mode) in [("tls.key", &issued.key_pem, 0o600), ("tls.crt", &issued.certificate_pem, 0o644)] {
        let fresh = folder.join(format!("{name}.new"));
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error(&fresh, error)),
            _ => create(&fresh, text.as_bytes(), mode)?,
        }
        fs::rename(&fresh, folder.join(name)).map_err(|error| io_error(&fresh, error))?;
    }
    Ok(format!(
        "Renewed {}/tls.crt and tls.key for {days} days.\nCopy both to that host, over the files its `[tls]` names: \
         a running sidecar picks them up at its next connection.\n",
        folder.display()
    ))
}

fn instructions(out: &Path, sites: &[SiteName], pair: PairId, days: u32) -> String {
    let mut text =
        format!("Pair {pair}\n\n1. Copy each site's folder to its host, and name the files in its configuration:\n\n");
    for site in sites {
        let folder = out.join(site.as_str());
        text.push_str(&format!(
            "   {folder}/ to the host of {site}:\n\n\
             \x20    site = \"{site}\"\n\
             \x20    [pair]\n\
             \x20    id = \"{pair}\"\n\
             \x20    [tls]\n\
             \x20    ca = \"/etc/watari/ca.crt\"\n\
             \x20    certificate = \"/etc/watari/tls.crt\"\n\
             \x20    key = \"/etc/watari/tls.key\"\n\n",
            folder = folder.display()
        ));
    }
    text.push_str(&format!(
        "2. Keep {out}/authority/ca.key off both hosts: whoever has it can join the pair.\n\
         3. The certificates end in {days} days; renew one with\n\
         \x20    watari-sidecar pki renew --out {out} --site <site>\n",
        out = out.display()
    ));
    text
}

fn io_error(path: &Path, error: io::Error) -> PkiError {
    PkiError::Io { path: path.to_owned(), error }
}

fn random_pair() -> Result<PairId, PkiError> {
    let mut id = [0u8; 16];
    rustls::crypto::aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut id)
        .map_err(|_| PkiError::Invalid("the system gives no random numbers".to_owned()))?;
    // Version 4, variant 1 (RFC 9562).
    id[6] = (id[6] & 0x0f) | 0x40;
    id[8] = (id[8] & 0x3f) | 0x80;
    Ok(PairId(id))
}

fn make_folder(path: &Path) -> Result<(), PkiError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| io_error(path, error))
}

fn create(path: &Path, contents: &[u8], mode: u32) -> Result<(), PkiError> {
    let opened = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let mut file = opened.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => PkiError::Exists(path.to_owned()),
        _ => io_error(path, error),
    })?;
    file.write_all(contents).and_then(|()| file.sync_all()).map_err(|error| io_error(path, error))
}
