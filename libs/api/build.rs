//! Compiles the protobuf contracts with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["common.proto", "federation.proto", "local.proto", "peers.proto", "tunnel.proto"];
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure()
        .bytes(".isthmus.federation.v1.ControlMessage")
        .bytes(".isthmus.federation.v1.Piece")
        .compile_fds(descriptors)?;
    Ok(())
}
