//! Writes the custom resource definitions into the chart: one file each, in `charts/watari/crds` or the folder that is named.

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let standard = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/watari/crds");
    let folder = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| standard.to_owned()));
    match write(&folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", folder.display());
            ExitCode::FAILURE
        }
    }
}

fn write(folder: &std::path::Path) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    for (name, text) in watari_crds::generate::files().map_err(std::io::Error::other)? {
        std::fs::write(folder.join(name), text)?;
    }
    Ok(())
}
