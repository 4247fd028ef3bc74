//! What things are called in Kubernetes: one place, so that controllers, webhooks, chart and command line agree.
//!
//! Everything that belongs to a pair is named after its *id*, the SyncPair's UID: the same at both sites, 36 bytes long,
//! never used twice. Whatever length a VM's name has, a name made of the id fits a label and a Service. People find objects by
//! the labels, which hold the readable names where they fit.

/// API group of everything of ours.
pub const GROUP: &str = "watari.io";
/// The one version.
pub const VERSION: &str = "v1alpha1";

/// Field manager of the operator's server-side apply.
pub const FIELD_MANAGER: &str = "watari-operator";
/// Field manager of the home's operator where it writes SyncReplicas and Secrets at the peer.
pub const FIELD_MANAGER_FROM_HOME: &str = "watari-home";
/// Value of `app.kubernetes.io/managed-by` and `app.kubernetes.io/part-of` on everything that we make.
pub const MANAGED_BY: &str = "watari";

/// Labels. A label's value has at most 63 bytes.
pub mod label {
    /// The pair's id, on everything of a pair: claims, Pods, Secrets, Services, and the template of a paired VM (whence
    /// KubeVirt copies it to VMI and virt-launcher Pod). Webhooks and policies select by its presence.
    pub const PAIR: &str = "watari.io/pair-id";
    /// Which part of a pair an object is: one of [`super::role`].
    pub const ROLE: &str = "watari.io/role";
    /// The name of the VM, where it fits a label.
    pub const VM: &str = "watari.io/vm";
    /// On Secrets and ConfigMaps that the home's operator brought to the peer, and on the kubeconfig Secret of a
    /// PeerCluster: the operator touches no Secret without it. The value is [`super::MANAGED_BY`].
    pub const MANAGED: &str = "app.kubernetes.io/managed-by";
    /// On claims: backup tools shall skip them (Velero's own label).
    pub const BACKUP_EXCLUDE: &str = "velero.io/exclude-from-backup";
}

/// Values of [`label::ROLE`].
pub mod role {
    /// A claim with the replica of one disk.
    pub const DATA: &str = "data";
    /// The claim with journal, undo, manifest and role record.
    pub const METADATA: &str = "metadata";
    /// The Pod that receives.
    pub const REPLICA: &str = "replica";
    /// The Service to which the gateway leads.
    pub const ENDPOINT: &str = "endpoint";
    /// The Secret with the sidecar's certificate.
    pub const CERTIFICATE: &str = "certificate";
    /// The ConfigMap with the sidecar's `sidecar.toml`.
    pub const CONFIGURATION: &str = "configuration";
}

/// Annotations.
pub mod annotation {
    /// The wiring of a paired VM, on the VM's template, whence KubeVirt copies it to VMI and virt-launcher Pod: JSON of
    /// [`crate::wiring::Wiring`]. The webhooks need nothing else to wire a Pod, so they work while the API is slow.
    pub const WIRING: &str = "watari.io/wiring";
    /// On a VMI, set by the webhook: the VM was started with our sidecar.
    pub const WIRED: &str = "watari.io/wired";
    /// KubeVirt's own: the hook sidecars of a VMI (a JSON array).
    pub const HOOK_SIDECARS: &str = "hooks.kubevirt.io/hookSidecars";
    /// KubeVirt's own: a Pod that only binds WaitForFirstConsumer claims; a sidecar in it ends at once.
    pub const EPHEMERAL_PROVISIONING: &str = "kubevirt.io/ephemeral-provisioning";
    /// KubeVirt's own, on a VMI: it waits to receive a migration (`pkg/virt-controller/watch/vm/vm.go`).
    pub const CREATE_MIGRATION_TARGET: &str = "kubevirt.io/create-migration-target";
    /// KubeVirt's own, on a VM: the run strategy that a receiver takes when the guest has come.
    pub const RESTORE_RUN_STRATEGY: &str = "kubevirt.io/restore-run-strategy";
}

/// Finalizers: only where something remote, or something that outlives its object, must be undone.
pub mod finalizer {
    /// On a SyncPair: the SyncReplica at the peer, the wiring of the VM.
    pub const PAIR: &str = "watari.io/pair";
    /// On a SyncReplica: the claims, which go only while their folder says `Replica`.
    pub const REPLICA: &str = "watari.io/replica";
    /// On a PeerCluster: pairs that still use it.
    pub const PEER: &str = "watari.io/peer";
}

/// Volumes, mounts and files inside a Pod of ours and inside a wired virt-launcher Pod. The sidecar's configuration is written
/// by the operator with these paths; the webhooks mount there.
pub mod path {
    /// Name of the sidecar's container in a replica Pod, and of the native sidecar in a virt-launcher Pod.
    pub const CONTAINER: &str = "watari";
    /// Folder of `sidecar.toml` (the ConfigMap's key).
    pub const CONFIGURATION_DIR: &str = "/watari/config";
    /// The configuration's key and file name.
    pub const CONFIGURATION_FILE: &str = "sidecar.toml";
    /// Folder of `ca.crt`, `tls.crt`, `tls.key` (the certificate Secret's keys).
    pub const TLS_DIR: &str = "/watari/tls";
    /// Mount point of the metadata claim. The sidecar's folder is `METADATA_DIR/folder`: a claim's root may hold
    /// `lost+found`.
    pub const METADATA_DIR: &str = "/watari/metadata";
    /// An emptyDir of medium Memory: the dirty map survives a restart of the container.
    pub const RUNTIME_DIR: &str = "/watari/runtime";
    /// A Filesystem claim of disk `NAME` is mounted at `DISKS_DIR/NAME`; its image is [`DISK_IMAGE`] in it.
    pub const DISKS_DIR: &str = "/watari/disks";
    /// KubeVirt's own name of an image in a Filesystem claim.
    pub const DISK_IMAGE: &str = "disk.img";
    /// A Block claim of disk `NAME` is the device `DEVICES_DIR/NAME`.
    pub const DEVICES_DIR: &str = "/dev/watari";
    /// An emptyDir at the same path in our container and in `compute`: the NBD sockets `DISK.sock`. KubeVirt would dial
    /// them as hooks in its own folder, so they are not there.
    pub const NBD_DIR: &str = "/var/run/watari/nbd";
    /// Where KubeVirt looks for hook sockets; mounted from its emptyDir with a subPath of our container's.
    pub const HOOKS_DIR: &str = "/var/run/kubevirt-hooks";
}

/// Ports of a sidecar.
pub mod port {
    /// mTLS: replication, and the control API for our own site.
    pub const SIDECAR: u16 = 7070;
    /// `/metrics`, `/healthz`, `/readyz`, plain HTTP.
    pub const METRICS: u16 = 9370;
    /// Where a gateway listens for the peer.
    pub const GATEWAY: u16 = 7443;
}

/// The TLS server name of a pair: gateways route by it, the listener's certificate contains it (PROTOCOL.md).
pub fn server_name(pair_id: &str) -> String {
    format!("{pair_id}.pair.watari.internal")
}

/// URI in the certificate of a pair's sidecar at a site (PROTOCOL.md): what binds a connection to a pair.
pub fn identity_uri(pair_id: &str, site: &str) -> String {
    format!("watari://pair/{pair_id}/site/{site}")
}

/// The Secret with `ca.crt`, `tls.crt`, `tls.key` of a pair at this site.
pub fn certificate_secret(pair_id: &str) -> String {
    format!("watari-{pair_id}-tls")
}

/// The ConfigMap with `sidecar.toml` of a pair at this site.
pub fn configuration(pair_id: &str) -> String {
    format!("watari-{pair_id}-config")
}

/// The metadata claim of a pair at this site.
pub fn metadata_claim(pair_id: &str) -> String {
    format!("watari-{pair_id}-metadata")
}

/// The replica Pod of a pair.
pub fn replica_pod(pair_id: &str) -> String {
    format!("watari-{pair_id}-replica")
}

/// The Service whose address the gateway of this site routes a pair to, whichever Pod holds its folder. Its selector is
/// [`label::PAIR`].
pub fn service(pair_id: &str) -> String {
    format!("watari-{pair_id}")
}

/// The ConfigMap, in the operator's own namespace, with the gateway's routes.
pub const GATEWAY_ROUTES: &str = "watari-gateway-routes";
/// The ConfigMap, in the operator's own namespace, by which a site tells its peers about itself; key [`SITE_CARD_KEY`].
pub const SITE_CARD: &str = "watari-site-card";
/// JSON of [`crate::card::SiteCard`].
pub const SITE_CARD_KEY: &str = "card.json";
/// The Secret, in the operator's own namespace, with the authority's certificates and key.
pub const AUTHORITY_SECRET: &str = "watari-authority";
/// The Lease of the leader election, in the operator's own namespace.
pub const LEASE: &str = "watari-operator";
/// The Service of the webhooks, in the operator's own namespace.
pub const WEBHOOK_SERVICE: &str = "watari-webhooks";
/// Name of the webhook configurations and of the admission policies, which belong to no namespace.
pub const ADMISSION: &str = "watari.io";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_made_of_an_id_fits_a_label() {
        let id = "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10";
        for name in [certificate_secret(id), configuration(id), metadata_claim(id), replica_pod(id), service(id)] {
            assert!(name.len() <= 63, "{name} has {} bytes", name.len());
        }
        assert!(server_name(id).split('.').all(|part| part.len() <= 63));
    }
}
