//! Certificates and kubeconfigs: an authority per cluster, nothing shared between clusters.
//!
//! Written once: a finished folder holds `done`; an unfinished one (a `kill -9` in the middle) is made anew, which is safe because
//! nothing has been started with it. Elliptic keys throughout, service account tokens included.
//!
//! Not for anything that outlives a test bed: keys lie on the disk, readable by root only because the folder above is.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};

use crate::folders::{self, Folders};
use crate::plan::{ClusterPlan, NodePlan};

/// A certificate cannot be made or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error(transparent)]
    Folder(#[from] folders::Error),
}

/// Marks a finished folder.
const DONE: &str = "done";
/// The administrator's kubeconfig as a node of the control plane sees it.
pub const ADMIN_IN_NODE: &str = "/etc/kubernetes/admin.conf";

/// An authority that signs.
struct Authority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key.
struct Issued {
    certificate_pem: String,
    key_pem: String,
}

fn valid(params: &mut CertificateParams) {
    // Longer than any test bed lives, and from before any clock that a test may set back.
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2060, 1, 1);
}

impl Authority {
    fn create(folder: &Path, name: &str) -> Result<Authority, Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        valid(&mut params);
        let certificate_pem = params.self_signed(&key)?.pem();
        folders::write(&folder.join(format!("{name}.crt")), certificate_pem.as_bytes())?;
        folders::write(&folder.join(format!("{name}.key")), key.serialize_pem().as_bytes())?;
        Ok(Authority { certificate_pem, issuer: Issuer::new(params, key) })
    }

    fn open(folder: &Path, name: &str) -> Result<Authority, Error> {
        let read = |extension| {
            let path = folder.join(format!("{name}.{extension}"));
            std::fs::read_to_string(&path).map_err(folders::at(&path))
        };
        let certificate_pem = read("crt")?;
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, KeyPair::from_pem(&read("key")?)?)?;
        Ok(Authority { certificate_pem, issuer })
    }

    /// `organization` is what Kubernetes reads as the group, the common name as the user.
    fn issue(
        &self,
        common_name: &str,
        organization: Option<&str>,
        usage: ExtendedKeyUsagePurpose,
        names: &[String],
    ) -> Result<Issued, Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names.to_vec())?;
        if let Some(organization) = organization {
            params.distinguished_name.push(DnType::OrganizationName, organization);
        }
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        valid(&mut params);
        Ok(Issued { certificate_pem: params.signed_by(&key, &self.issuer)?.pem(), key_pem: key.serialize_pem() })
    }
}

impl Issued {
    fn write(&self, folder: &Path, name: &str) -> Result<(), Error> {
        folders::write(&folder.join(format!("{name}.crt")), self.certificate_pem.as_bytes())?;
        folders::write(&folder.join(format!("{name}.key")), self.key_pem.as_bytes())?;
        Ok(())
    }

    /// A kubeconfig that needs no other file. (It is JSON, which is YAML.)
    fn kubeconfig(&self, cluster: &ClusterPlan, authority: &Authority, server: &str) -> Vec<u8> {
        let name = cluster.name();
        let encode = |pem: &str| BASE64.encode(pem);
        serde_json::to_vec_pretty(&serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": name, "cluster": { "server": server, "certificate-authority-data": encode(&authority.certificate_pem) } }],
            "users": [{ "name": name, "user": { "client-certificate-data": encode(&self.certificate_pem), "client-key-data": encode(&self.key_pem) } }],
            "contexts": [{ "name": name, "context": { "cluster": name, "user": name } }],
            "current-context": name,
        }))
        .expect("plain data")
    }
}

/// The cluster's authorities, the administrator's kubeconfig, the control plane's certificates.
pub fn ensure_cluster(folders: &Folders, cluster: &ClusterPlan) -> Result<(), Error> {
    let folder = folders.cluster(cluster).join("pki");
    if folder.join(DONE).exists() {
        return Ok(());
    }
    let authority = Authority::create(&folder, "ca")?;
    let front_proxy = Authority::create(&folder, "front-proxy-ca")?;
    let control_plane = cluster.control_plane();
    let names = [
        "kubernetes".to_owned(),
        "kubernetes.default".to_owned(),
        "kubernetes.default.svc".to_owned(),
        "localhost".to_owned(),
        control_plane.name(),
        "127.0.0.1".to_owned(),
        control_plane.address().to_string(),
        cluster.kubernetes_address().to_string(),
    ];
    let (server, client) = (ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth);
    authority.issue("kube-apiserver", None, server, &names)?.write(&folder, "apiserver")?;
    let masters = Some("system:masters");
    authority.issue("apiserver-kubelet-client", masters, client.clone(), &[])?.write(&folder, "kubelet-client")?;
    front_proxy.issue("front-proxy-client", None, client.clone(), &[])?.write(&folder, "front-proxy-client")?;
    let tokens = KeyPair::generate()?;
    folders::write(&folder.join("sa.key"), tokens.serialize_pem().as_bytes())?;
    folders::write(&folder.join("sa.pub"), tokens.public_key_pem().as_bytes())?;

    let admin = authority.issue("admin", masters, client, &[])?;
    let outside = format!("https://127.0.0.1:{}", cluster.api_port());
    folders::write(&folders.kubeconfig(cluster), &admin.kubeconfig(cluster, &authority, &outside))?;
    folders::write(&folder.join(DONE), b"")?;
    Ok(())
}

/// What one node needs, in `NODE/kubernetes`. The cluster's own must be there.
pub fn ensure_node(folders: &Folders, node: &NodePlan) -> Result<(), Error> {
    let (folder, shared) = (folders.node(node).join("kubernetes"), folders.cluster(&node.cluster).join("pki"));
    if folder.join(DONE).exists() {
        return Ok(());
    }
    let copy = |name: &str| {
        let from = shared.join(name);
        let bytes = std::fs::read(&from).map_err(folders::at(&from))?;
        folders::write(&folder.join("pki").join(name), &bytes)
    };
    copy("ca.crt")?;
    if node.is_control_plane() {
        for name in ["ca.key", "front-proxy-ca.crt", "sa.key", "sa.pub"] {
            copy(name)?;
        }
        for name in ["apiserver", "kubelet-client", "front-proxy-client"] {
            copy(&format!("{name}.crt"))?;
            copy(&format!("{name}.key"))?;
        }
    }
    let authority = Authority::open(&shared, "ca")?;
    let (server, client) = (ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth);
    let user = format!("system:node:{}", node.name());
    let names = [node.name(), node.address().to_string()];
    authority.issue(&user, Some("system:nodes"), server, &names)?.write(&folder.join("pki"), "kubelet-server")?;
    let api = format!("https://{}:6443", node.cluster.control_plane().address());
    let write = |name: &str, common_name: &str, organization| -> Result<(), Error> {
        let issued = authority.issue(common_name, organization, client.clone(), &[])?;
        folders::write(&folder.join(name), &issued.kubeconfig(&node.cluster, &authority, &api))?;
        Ok(())
    };
    write("kubelet.conf", &user, Some("system:nodes"))?;
    write("kube-proxy.conf", "system:kube-proxy", None)?;
    if node.is_control_plane() {
        write("controller-manager.conf", "system:kube-controller-manager", None)?;
        write("scheduler.conf", "system:kube-scheduler", None)?;
        write("admin.conf", "admin", Some("system:masters"))?;
    }
    folders::write(&folder.join(DONE), b"")?;
    Ok(())
}
