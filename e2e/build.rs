//! Compiles the sample app's gRPC contract.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    tonic_prost_build::configure().compile_fds(protox::compile(["shop.proto"], ["proto"])?)?;
    Ok(())
}
