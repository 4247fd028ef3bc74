//! The folder `KUBEVIRT_DIR`. Looks and tells; changes nothing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::folders;

const VARIABLE: &str = "KUBEVIRT_DIR";
const OPERATOR: &str = "kubevirt-operator.yaml";
const CUSTOM_RESOURCE: &str = "kubevirt-cr.yaml";
const IMAGES: &str = "images";

/// What is wrong with the folder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{VARIABLE} is not set: say which folder holds KubeVirt; e2e/clusters/README.md tells how to fill it")]
    Unset,
    #[error("{0} is missing in {VARIABLE}; e2e/clusters/README.md tells how to fill it")]
    Missing(PathBuf),
    #[error("no archive in {folder} holds these images:\n{}\nsave each there, e.g. `skopeo copy docker://IMAGE docker-archive:NAME.tar:IMAGE`", list(.images))]
    Images { folder: PathBuf, images: Vec<String> },
    #[error(transparent)]
    Folder(#[from] folders::Error),
}

fn list(images: &[String]) -> String {
    images.iter().map(|image| format!("  {image}")).collect::<Vec<_>>().join("\n")
}

/// The folder, known to hold a manifest and a place for images.
#[derive(Debug)]
pub struct Package {
    root: PathBuf,
}

impl Package {
    /// The folder that the environment names.
    pub fn from_environment() -> Result<Package, Error> {
        let root = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()).ok_or(Error::Unset)?;
        Package::open(Path::new(&root))
    }

    /// A folder with all that a deployment needs at the least.
    pub fn open(root: &Path) -> Result<Package, Error> {
        for name in [OPERATOR, IMAGES] {
            let path = root.join(name);
            if !path.exists() {
                return Err(Error::Missing(path));
            }
        }
        Ok(Package { root: root.to_owned() })
    }

    /// Path of the operator's manifest.
    pub fn operator(&self) -> String {
        self.root.join(OPERATOR).to_string_lossy().into_owned()
    }

    /// Folder of the image archives.
    pub fn images(&self) -> PathBuf {
        self.root.join(IMAGES)
    }

    /// The KubeVirt object to create, if the folder brings one.
    pub fn custom_resource(&self) -> Result<Option<String>, Error> {
        let path = self.root.join(CUSTOM_RESOURCE);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(folders::at(&path)(error).into()),
        }
    }

    /// Fails unless all wanted images are among those that a node has.
    pub fn require(&self, wanted: &[String], present: &BTreeSet<String>) -> Result<(), Error> {
        let images: Vec<String> = wanted.iter().filter(|image| !present.contains(*image)).cloned().collect();
        match images.is_empty() {
            true => Ok(()),
            false => Err(Error::Images { folder: self.images(), images }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_folder_lacks_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let lacks = |what: &str| {
            let error = Package::open(folder.path()).unwrap_err().to_string();
            assert!(error.contains(what) && error.contains("README.md"), "{error}");
        };
        lacks(OPERATOR);
        std::fs::write(folder.path().join(OPERATOR), "").unwrap();
        lacks(IMAGES);
        std::fs::create_dir(folder.path().join(IMAGES)).unwrap();
        let package = Package::open(folder.path()).unwrap();
        assert!(package.custom_resource().unwrap().is_none());
    }

    #[test]
    fn images_that_no_archive_brought_are_listed_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(OPERATOR), "").unwrap();
        std::fs::create_dir(folder.path().join(IMAGES)).unwrap();
        let package = Package::open(folder.path()).unwrap();
        let wanted = ["r/virt-api:1", "r/virt-handler:1"].map(str::to_owned);
        let has = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        package.require(&wanted, &has(&["r/virt-api:1", "r/virt-handler:1", "other"])).unwrap();
        let error = package.require(&wanted, &has(&["r/virt-api:1"])).unwrap_err().to_string();
        assert!(
            error.contains("r/virt-handler:1") && error.contains("skopeo") && !error.contains("r/virt-api:1"),
            "{error}"
        );
    }
}
