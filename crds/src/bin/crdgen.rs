//! Writes what is generated from the code into the tree, or into the folder that is named: the custom resource definitions, one file each
//! in `charts/watari/crds`, and `docs/conditions.md`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use watari_crds::generate;

fn main() -> ExitCode {
    let standard = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let tree = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| standard.to_owned()));
    match write(&tree) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", tree.display());
            ExitCode::FAILURE
        }
    }
}

fn write(tree: &Path) -> std::io::Result<()> {
    for (path, text) in generate::files().map_err(std::io::Error::other)? {
        let file = tree.join(path);
        std::fs::create_dir_all(file.parent().unwrap_or(tree))?;
        std::fs::write(file, text)?;
    }
    Ok(())
}
