//! Shared by the tests of the shells: certificates in a folder, and a steering that only remembers.
#![allow(dead_code, clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use watari_sidecar::{
    config::TlsFiles,
    engine::steering::{Declined, Intent, IntentFuture, Outcome, Steering},
    identity::{Identity, PairId},
    pki::{Authority, Issued, Validity},
    tls::{Tls, TlsError},
};
use watari_wire::report::Report;

pub const PAIR: &str = "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10";
pub const OTHER_PAIR: &str = "11111111-2222-4333-8444-555555555555";

pub fn pair(text: &str) -> PairId {
    text.parse().unwrap()
}

pub fn identity(pair_id: &str, site: &str) -> Identity {
    Identity { pair: pair(pair_id), site: site.parse().unwrap() }
}

pub fn authority(name: &str) -> Authority {
    Authority::new(name, Validity::days(30)).unwrap()
}

/// A folder with `ca.crt`, `tls.crt` and `tls.key`.
pub struct Folder {
    pub dir: tempfile::TempDir,
    pub own: Identity,
}

impl Folder {
    /// `trusted` vouches for peers, `issuer` issued our own certificate.
    pub fn new(trusted: &Authority, issuer: &Authority, own: Identity, validity: Validity) -> Folder {
        let folder = Folder { dir: tempfile::tempdir().unwrap(), own };
        folder.write("ca.crt", &trusted.certificate_pem);
        folder.install(&folder.issue(issuer, validity));
        folder
    }

    pub fn issue(&self, issuer: &Authority, validity: Validity) -> Issued {
        issuer.issue(&self.own, &[pair(PAIR).server_name()], validity).unwrap()
    }

    pub fn install(&self, issued: &Issued) {
        self.write("tls.crt", &issued.certificate_pem);
        self.write("tls.key", &issued.key_pem);
    }

    /// By renaming, as kubelet and `pki renew` do.
    pub fn write(&self, name: &str, text: &str) {
        let fresh = self.path("fresh");
        fs::write(&fresh, text).unwrap();
        fs::rename(fresh, self.path(name)).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn files(&self) -> TlsFiles {
        TlsFiles { ca: self.path("ca.crt"), certificate: self.path("tls.crt"), key: self.path("tls.key") }
    }

    pub fn tls(&self) -> Arc<Tls> {
        self.try_tls().unwrap_or_else(|error| panic!("{error}"))
    }

    pub fn try_tls(&self) -> Result<Arc<Tls>, TlsError> {
        Tls::load(self.files(), self.own.clone())
    }
}

/// Not an engine: it remembers what it was asked and answers as it was told. For tests of the shells around an engine.
#[derive(Default)]
pub struct RememberingSteering {
    pub asked: Mutex<Vec<Intent>>,
    pub answer: Mutex<Option<Result<Outcome, Declined>>>,
    pub report: Mutex<Report>,
}

impl RememberingSteering {
    pub fn new() -> Arc<Self> {
        let steering = Arc::new(RememberingSteering::default());
        let mut report = Report { pair: "default/vm1".to_owned(), site: "tokyo".to_owned(), ..Report::default() };
        report.role = "Serving".to_owned();
        report.version = "0.1.0".to_owned();
        report.trust = "Tracked".to_owned();
        *steering.report.lock().unwrap() = report;
        steering
    }

    pub fn answer(&self, answer: Result<Outcome, Declined>) {
        *self.answer.lock().unwrap() = Some(answer);
    }

    pub fn last(&self) -> Intent {
        self.asked.lock().unwrap().last().cloned().expect("something was asked")
    }
}

impl Steering for RememberingSteering {
    fn report(&self) -> Report {
        self.report.lock().unwrap().clone()
    }

    fn intent(&self, intent: Intent) -> IntentFuture<'_> {
        self.asked.lock().unwrap().push(intent);
        let answer = self.answer.lock().unwrap().clone().unwrap_or_else(|| Ok(Outcome::Done("done".to_owned())));
        Box::pin(async move { answer })
    }
}

/// A whole configuration for a sidecar whose files all lie in `root`.
pub fn config_text(root: &Path) -> String {
    let root = root.display();
    format!(
        "site = \"tokyo\"\nfolder = \"{root}/state\"\nruntime_dir = \"{root}/run\"\nlisten = \"127.0.0.1:0\"\n\
         [pair]\nid = \"{PAIR}\"\nname = \"default/vm1\"\n\
         [[disk]]\nname = \"root\"\npath = \"{root}/root.img\"\nsize = \"1MiB\"\n\
         [nbd]\ndir = \"{root}/nbd\"\n[peer]\naddresses = [\"127.0.0.1:9\"]\n\
         [tls]\nca = \"{root}/ca.crt\"\ncertificate = \"{root}/tls.crt\"\nkey = \"{root}/tls.key\"\n\
         [control]\nsocket = \"{root}/control.sock\"\n"
    )
}
