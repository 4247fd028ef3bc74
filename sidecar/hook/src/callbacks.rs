//! The generated gRPC services, each method one line to what answers it.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::HookEngine;
use crate::proto::{info, v1alpha1, v1alpha2, v1alpha3};
use crate::server::Definer;

/// The name that virt-launcher logs.
const SIDECAR_NAME: &str = "watari";

/// All services of one hook socket.
pub(crate) struct Callbacks<E>(Arc<Definer<E>>);

impl<E> Callbacks<E> {
    pub fn new(definer: Definer<E>) -> Self {
        Callbacks(Arc::new(definer))
    }
}

impl<E> Clone for Callbacks<E> {
    fn clone(&self) -> Self {
        Callbacks(self.0.clone())
    }
}

fn never_offered() -> Status {
    Status::unimplemented("PreCloudInitIso is not offered by this hook sidecar")
}

#[tonic::async_trait]
impl<E: HookEngine> info::info_server::Info for Callbacks<E> {
    async fn info(&self, _: Request<info::InfoParams>) -> Result<Response<info::InfoResult>, Status> {
        let point = |name: &str| info::HookPoint { name: name.into(), priority: 0 };
        Ok(Response::new(info::InfoResult {
            name: SIDECAR_NAME.into(),
            hook_points: vec![point("OnDefineDomain"), point("Shutdown")],
            versions: ["v1alpha3", "v1alpha2", "v1alpha1"].map(str::to_owned).to_vec(),
        }))
    }
}

#[tonic::async_trait]
impl<E: HookEngine> v1alpha1::callbacks_server::Callbacks for Callbacks<E> {
    async fn on_define_domain(
        &self,
        request: Request<v1alpha1::OnDefineDomainParams>,
    ) -> Result<Response<v1alpha1::OnDefineDomainResult>, Status> {
        let v1alpha1::OnDefineDomainParams { domain_xml, vmi } = request.into_inner();
        let domain_xml = self.0.define(&domain_xml, &vmi).await?;
        Ok(Response::new(v1alpha1::OnDefineDomainResult { domain_xml }))
    }
}

#[tonic::async_trait]
impl<E: HookEngine> v1alpha2::callbacks_server::Callbacks for Callbacks<E> {
    async fn on_define_domain(
        &self,
        request: Request<v1alpha2::OnDefineDomainParams>,
    ) -> Result<Response<v1alpha2::OnDefineDomainResult>, Status> {
        let v1alpha2::OnDefineDomainParams { domain_xml, vmi } = request.into_inner();
        let domain_xml = self.0.define(&domain_xml, &vmi).await?;
        Ok(Response::new(v1alpha2::OnDefineDomainResult { domain_xml }))
    }

    async fn pre_cloud_init_iso(
        &self,
        _: Request<v1alpha2::PreCloudInitIsoParams>,
    ) -> Result<Response<v1alpha2::PreCloudInitIsoResult>, Status> {
        Err(never_offered())
    }
}

#[tonic::async_trait]
impl<E: HookEngine> v1alpha3::callbacks_server::Callbacks for Callbacks<E> {
    async fn on_define_domain(
        &self,
        request: Request<v1alpha3::OnDefineDomainParams>,
    ) -> Result<Response<v1alpha3::OnDefineDomainResult>, Status> {
        let v1alpha3::OnDefineDomainParams { domain_xml, vmi } = request.into_inner();
        let domain_xml = self.0.define(&domain_xml, &vmi).await?;
        Ok(Response::new(v1alpha3::OnDefineDomainResult { domain_xml }))
    }

    async fn pre_cloud_init_iso(
        &self,
        _: Request<v1alpha3::PreCloudInitIsoParams>,
    ) -> Result<Response<v1alpha3::PreCloudInitIsoResult>, Status> {
        Err(never_offered())
    }

    async fn shutdown(
        &self,
        _: Request<v1alpha3::ShutdownParams>,
    ) -> Result<Response<v1alpha3::ShutdownResult>, Status> {
        self.0.shutdown().await;
        Ok(Response::new(v1alpha3::ShutdownResult {}))
    }
}
