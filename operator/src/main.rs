//! The operator's process. It has no controller yet, and says so.

fn main() -> std::process::ExitCode {
    eprintln!("watari-operator {}: no controller yet", env!("CARGO_PKG_VERSION"));
    std::process::ExitCode::FAILURE
}
