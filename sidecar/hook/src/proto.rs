//! Generated stubs of KubeVirt's hook protocols (`proto/*.proto`).

#![allow(missing_docs, clippy::all)]

/// `kubevirt.hooks.info`: discovery.
pub mod info {
    tonic::include_proto!("kubevirt.hooks.info");
}
/// `kubevirt.hooks.v1alpha1`: the oldest callbacks.
pub mod v1alpha1 {
    tonic::include_proto!("kubevirt.hooks.v1alpha1");
}
/// `kubevirt.hooks.v1alpha2`: adds PreCloudInitIso.
pub mod v1alpha2 {
    tonic::include_proto!("kubevirt.hooks.v1alpha2");
}
/// `kubevirt.hooks.v1alpha3`: adds Shutdown.
pub mod v1alpha3 {
    tonic::include_proto!("kubevirt.hooks.v1alpha3");
}
