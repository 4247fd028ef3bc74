//! Container images without a registry and without an image builder: an archive (`docker save` format) of one layer, made with `tar`,
//! imported into each node's containerd.
//!
//! An archive is the same, byte for byte, whenever its files are; a node imports one only if it does not have it yet. Archives from
//! elsewhere that lie in the folder are imported as well (KubeVirt's own, for one).

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use watari_e2e::build;

use crate::folders::{self, Folders};
use crate::node;
use crate::plan::{NodePlan, Plan};

/// What a Pod's namespaces hang on.
pub const PAUSE_IMAGE: &str = "watari.internal/pause:1";
/// A shell and small tools, for Pods of tests.
pub const BUSYBOX_IMAGE: &str = "watari.internal/busybox:1";
/// The sidecar as it is in the work tree.
pub const SIDECAR_IMAGE: &str = "watari.internal/watari-sidecar:dev";
/// The operator as it is in the work tree.
pub const OPERATOR_IMAGE: &str = "watari.internal/watari-operator:dev";
/// Debian's static busybox (package busybox-static).
pub const BUSYBOX: &str = "/bin/busybox";

/// Why an image is not there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Folder(#[from] folders::Error),
    #[error(transparent)]
    Node(#[from] node::Error),
    #[error(transparent)]
    Build(#[from] build::Error),
    #[error("{program}: {message}")]
    Tool { program: String, message: String },
}

/// A name for a layer, and how a container of it starts.
pub struct Image<'a> {
    pub name: &'a str,
    /// The `config` object of the image specification: Entrypoint, Cmd, Env, User.
    pub config: Value,
}

/// Runs a command to its end; answers what it printed.
pub(crate) fn tool(command: &mut Command) -> Result<String, Error> {
    let program = format!("{command:?}");
    let fail = |message: String| Error::Tool { program: program.clone(), message };
    let output = command.output().map_err(|error| fail(error.to_string()))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(fail(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

fn sha256(path: &Path) -> Result<String, Error> {
    let output = tool(Command::new("sha256sum").arg(path))?;
    Ok(output.split_whitespace().next().unwrap_or_default().to_owned())
}

/// A scratch folder, removed with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn create(folder: &Path, label: &str) -> Result<Scratch, Error> {
        let path = folder.join(format!(".{label}-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(folders::at(&path))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Packs the trees `layers`, lowest first, as an image under each of the given names into `NAME.tar` in `folder`. A node unpacks
/// only the layers that it does not have.
pub fn pack(folder: &Path, name: &str, layers: &[&Path], images: &[Image]) -> Result<PathBuf, Error> {
    let scratch = Scratch::create(folder, name)?;
    let tar = |to: &Path, from: &Path, what: &[String]| {
        let mut command = Command::new("tar");
        command.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0", "-cf"]);
        tool(command.arg(to).arg("-C").arg(from).args(what)).map(drop)
    };
    let (mut files, mut digests) = (Vec::new(), Vec::new());
    for (number, root) in layers.iter().enumerate() {
        let file = format!("layer-{number}.tar");
        tar(&scratch.0.join(&file), root, &[".".to_owned()])?;
        digests.push(format!("sha256:{}", sha256(&scratch.0.join(&file))?));
        files.push(file);
    }
    let layers = files.clone();
    let mut manifest = Vec::new();
    for image in images {
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": image.config,
            "rootfs": { "type": "layers", "diff_ids": digests },
        });
        let unnamed = scratch.0.join("config");
        std::fs::write(&unnamed, config.to_string()).map_err(folders::at(&unnamed))?;
        let file = format!("{}.json", sha256(&unnamed)?);
        std::fs::rename(&unnamed, scratch.0.join(&file)).map_err(folders::at(&unnamed))?;
        manifest.push(json!({ "Config": file, "RepoTags": [image.name], "Layers": layers }));
        files.push(file);
    }
    folders::write(&scratch.0.join("manifest.json"), Value::from(manifest).to_string().as_bytes())?;
    files.push("manifest.json".to_owned());
    let (fresh, archive) = (scratch.0.join("archive"), folder.join(format!("{name}.tar")));
    tar(&fresh, &scratch.0, &files)?;
    // Untouched if it is the same: nodes go by its date.
    if std::fs::read(&archive).ok() != Some(std::fs::read(&fresh).map_err(folders::at(&fresh))?) {
        std::fs::rename(&fresh, &archive).map_err(folders::at(&archive))?;
    }
    Ok(archive)
}

/// Pause and busybox.
pub fn ensure_base(folders: &Folders) -> Result<(), Error> {
    if folders.images().join("base.tar").exists() {
        return Ok(());
    }
    let scratch = Scratch::create(&folders.images(), "base-tree")?;
    let make = |name: &str| {
        let path = scratch.0.join(name);
        std::fs::create_dir_all(&path).map_err(folders::at(&path))?;
        Ok::<PathBuf, Error>(path)
    };
    let (bin, etc) = (make("bin")?, make("etc")?);
    for name in ["tmp", "proc", "sys", "dev", "var", "root"] {
        make(name)?;
    }
    std::fs::copy(BUSYBOX, bin.join("busybox")).map_err(folders::at(Path::new(BUSYBOX)))?;
    for applet in tool(Command::new(BUSYBOX).arg("--list"))?.lines().filter(|applet| *applet != "busybox") {
        std::os::unix::fs::symlink("busybox", bin.join(applet)).map_err(folders::at(&bin))?;
    }
    folders::write(&etc.join("passwd"), b"root:x:0:0::/root:/bin/sh\nqemu:x:107:107::/:/bin/sh\n")?;
    folders::write(&etc.join("group"), b"root:x:0:\nqemu:x:107:\n")?;
    let path = json!(["PATH=/bin"]);
    let images = [
        Image { name: PAUSE_IMAGE, config: json!({ "Entrypoint": ["/bin/sleep", "2147483647"], "Env": path }) },
        Image { name: BUSYBOX_IMAGE, config: json!({ "Entrypoint": ["/bin/sh"], "Env": path }) },
    ];
    pack(&folders.images(), "base", &[&scratch.0], &images)?;
    Ok(())
}

/// Packs the sidecar as it is built for tests.
pub fn ensure_sidecar(folders: &Folders) -> Result<(), Error> {
    pack_linked(folders, &build::binary("watari-sidecar")?, SIDECAR_IMAGE)
}

/// Packs a built operator (`program`).
pub fn ensure_operator(folders: &Folders, program: &Path) -> Result<(), Error> {
    pack_linked(folders, program, OPERATOR_IMAGE)
}

/// Both images as users get them, one static file each and in release, under the names of the chart's values. Answers their archives.
pub fn release(folder: &Path) -> Result<[PathBuf; 2], Error> {
    std::fs::create_dir_all(folder).map_err(folders::at(folder))?;
    let pack = |program: &str| {
        let built = build::static_binary(program, "release")?;
        let scratch = Scratch::create(folder, &format!("{program}-tree"))?;
        std::fs::copy(&built, scratch.0.join(program)).map_err(folders::at(&built))?;
        let name = format!("watari/{program}:{}", env!("CARGO_PKG_VERSION"));
        let image = Image { name: &name, config: json!({ "Entrypoint": [format!("/{program}")] }) };
        pack(folder, program, &[&scratch.0], &[image])
    };
    Ok([pack("watari-sidecar")?, pack("watari-operator")?])
}

/// Packs a built program with the libraries that it is linked with, which are a layer of their own. What tests run is thus what cargo built
/// for them; linking it statically would build everything a second time.
fn pack_linked(folders: &Folders, program: &Path, image: &str) -> Result<(), Error> {
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let (libraries, own) = (
        Scratch::create(&folders.images(), &format!("{name}-libraries"))?,
        Scratch::create(&folders.images(), &format!("{name}-tree"))?,
    );
    for library in linked_with(program)? {
        let copy = libraries.0.join(library.strip_prefix("/").unwrap_or(&library));
        let folder = copy.parent().unwrap_or(&libraries.0);
        std::fs::create_dir_all(folder).map_err(folders::at(folder))?;
        std::fs::copy(&library, &copy).map_err(folders::at(&library))?;
    }
    // Debugging it takes the unstripped one.
    tool(Command::new("strip").arg("-o").arg(own.0.join(&*name)).arg(program))?;
    let image = Image { name: image, config: json!({ "Entrypoint": [format!("/{name}")] }) };
    pack(&folders.images(), &name, &[&libraries.0, &own.0], &[image])?;
    Ok(())
}

/// Every file that the loader maps for `program`, the loader itself among them.
fn linked_with(program: &Path) -> Result<Vec<PathBuf>, Error> {
    let printed = tool(Command::new("ldd").arg(program))?;
    let paths = printed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(paths.map(PathBuf::from).collect())
}

/// Gives every archive of ours to every node. Answers how many imports there were.
pub fn import(folders: &Folders, plan: &Plan) -> Result<usize, Error> {
    import_from(folders, &folders.images(), plan.nodes())
}

/// Gives the archives (`*.tar`) in a folder to these nodes, all at the same time, unless they have them.
pub fn import_from(folders: &Folders, from: &Path, nodes: impl Iterator<Item = NodePlan>) -> Result<usize, Error> {
    let archives = &archives(from)?;
    std::thread::scope(|scope| {
        let jobs: Vec<_> = nodes.map(|node| scope.spawn(move || import_into(folders, archives, &node))).collect();
        jobs.into_iter().map(|job| job.join().expect("an import returns its errors")).sum()
    })
}

fn archives(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = std::fs::read_dir(folder).map_err(folders::at(folder))?.flatten().map(|entry| entry.path());
    let mut archives: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|end| end == "tar")).collect();
    archives.sort();
    Ok(archives)
}

fn import_into(folders: &Folders, archives: &[PathBuf], node: &NodePlan) -> Result<usize, Error> {
    let mut imported = 0;
    node::await_runtime(folders, node)?;
    for archive in archives {
        let name = archive.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let stamp = folders.node(node).join("imported").join(name);
        let version = version(archive).map_err(folders::at(archive))?;
        if std::fs::read_to_string(&stamp).is_ok_and(|known| known == version) {
            continue;
        }
        // A node's view of the machine may lack the folder; its own root sees the archive through a descriptor.
        let file = std::fs::File::open(archive).map_err(folders::at(archive))?;
        tool(node::command(folders, node, "ctr")?.args(["-n", "k8s.io", "images", "import", "-"]).stdin(file))?;
        folders::write(&stamp, version.as_bytes())?;
        imported += 1;
    }
    Ok(imported)
}

/// Names of the images that a node has.
pub fn names(folders: &Folders, node: &NodePlan) -> Result<BTreeSet<String>, Error> {
    let listed = tool(node::command(folders, node, "ctr")?.args(["-n", "k8s.io", "images", "ls", "-q"]))?;
    Ok(listed.lines().map(str::to_owned).collect())
}

fn version(archive: &Path) -> io::Result<String> {
    let metadata = std::fs::metadata(archive)?;
    Ok(format!("{}-{:?}", metadata.len(), metadata.modified()?))
}
