//! Compiles KubeVirt's hook protocols with protox, so that no `protoc` is needed on the machine.

use std::error::Error;

const PROTOS: [&str; 4] = [
    "proto/hooks_info.proto",
    "proto/hooks_v1alpha1.proto",
    "proto/hooks_v1alpha2.proto",
    "proto/hooks_v1alpha3.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    for proto in PROTOS {
        println!("cargo::rerun-if-changed={proto}");
    }
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
