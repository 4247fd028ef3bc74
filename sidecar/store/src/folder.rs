//! A folder of plain files, and disk images that are files or block devices: the real media behind the replica engine.
//!
//! [`Folder`] implements [`Storage`] for the metadata folder, [`DiskImages`] implements [`Images`] for the data claims. Both are cheap
//! handles on shared descriptors, so that reader threads use positional reads beside the engine. Names are flat: a name with a
//! separator is refused. Sticky failure (style item 6): after a failed write or sync that was not for want of room, the file is
//! refused until the process starts again; no sync is retried, and want of room in a sync counts as failure.
//!
//! It takes no lock on the folder and creates no folder by itself.

use rustix::fs::{FallocateFlags, fallocate};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{FileExt, FileTypeExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use watari_core::{
    geometry::DiskIndex,
    replica::Images,
    storage::{Storage, StorageError},
};

/// Bytes of zeroes written at a time where a hole cannot be punched.
const ZERO_CHUNK_BYTES: usize = 1 << 20;
/// Most descriptors kept open in one folder; journal segments come and go.
const OPEN_FILES_MAX: usize = 64;

/// A metadata folder. Clones share descriptors and failures.
#[derive(Clone, Debug)]
pub struct Folder {
    path: Arc<PathBuf>,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    files: BTreeMap<String, Arc<File>>,
    /// Written since their last sync: their descriptors stay open, so that a write error found later reaches the sync.
    dirty: BTreeSet<String>,
    poisoned: BTreeSet<String>,
}

impl Folder {
    /// Use an existing folder.
    pub fn open(path: &Path) -> io::Result<Folder> {
        let kind = fs::metadata(path)?;
        if !kind.is_dir() {
            return Err(io::Error::new(ErrorKind::NotADirectory, format!("{} is not a folder", path.display())));
        }
        Ok(Folder { path: Arc::new(path.to_path_buf()), shared: Arc::default() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // The guarded maps are consistent at every point where a panic could come.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, name: &str) -> Result<PathBuf, StorageError> {
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return Err(StorageError::Io(name.into(), "not a plain file name".into()));
        }
        Ok(self.path.join(name))
    }

    fn file(&self, name: &str, create: bool) -> Result<Arc<File>, StorageError> {
        let place = self.place(name)?;
        let mut shared = self.lock();
        if shared.poisoned.contains(name) {
            return Err(StorageError::Io(name.into(), "closed since an earlier failure".into()));
        }
        if let Some(file) = shared.files.get(name).cloned() {
            if create {
                shared.dirty.insert(name.into());
            }
            return Ok(file);
        }
        // A folder on a read-only medium can still be inspected.
        let writable = OpenOptions::new().read(true).write(true).create(create).truncate(false).open(&place);
        let opened = match writable {
            Err(error)
                if !create && matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) =>
            {
                File::open(&place)
            }
            other => other,
        };
        let file = Arc::new(opened.map_err(|error| storage_error(name, error))?);
        if shared.files.len() >= OPEN_FILES_MAX {
            let Shared { files, dirty, .. } = &mut *shared;
            files.retain(|name, _| dirty.contains(name));
        }
        shared.files.insert(name.into(), file.clone());
        if create {
            shared.dirty.insert(name.into());
        }
        Ok(file)
    }

    /// Remember a failure that is not want of room.
    fn noted<T>(&self, name: &str, outcome: io::Result<T>) -> Result<T, StorageError> {
        outcome.map_err(|error| {
            let error = storage_error(name, error);
            if matches!(error, StorageError::Io(..)) {
                self.lock().poisoned.insert(name.into());
            }
            error
        })
    }
}

/// Want of room and want of quota are `NoSpace`; all else is a failed medium.
fn storage_error(name: &str, error: io::Error) -> StorageError {
    match error.kind() {
        ErrorKind::NotFound => StorageError::Missing(name.into()),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => StorageError::NoSpace(name.into()),
        _ => StorageError::Io(name.into(), error.to_string()),
    }
}

/// A sync that failed for want of room has lost data like any other failed sync.
fn sync_error(name: &str, error: io::Error) -> StorageError {
    StorageError::Io(name.into(), format!("sync: {error}"))
}

fn read_full(file: &File, mut offset: u64, mut buf: &mut [u8]) -> io::Result<usize> {
    let mut total = 0;
    while !buf.is_empty() {
        match file.read_at(buf, offset) {
            Ok(0) => break,
            Ok(count) => {
                total += count;
                offset += count as u64;
                buf = &mut buf[count..];
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(total)
}

/// Make a range read as zeroes: punch, else zero in place, else write zeroes.
fn zero_range(file: &File, offset: u64, length: u64) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    for flags in [FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, FallocateFlags::ZERO_RANGE] {
        match fallocate(file, flags, offset, length) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL | rustix::io::Errno::NODEV) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let zeroes = vec![0; ZERO_CHUNK_BYTES.min(usize::try_from(length).unwrap_or(ZERO_CHUNK_BYTES))];
    let mut at = offset;
    while at < offset + length {
        let step = (offset + length - at).min(zeroes.len() as u64) as usize;
        file.write_all_at(&zeroes[..step], at)?;
        at += step as u64;
    }
    Ok(())
}

impl Storage for Folder {
    fn list(&self) -> Result<Vec<String>, StorageError> {
        let folder = |error| storage_error(".", error);
        let mut names = Vec::new();
        for entry in fs::read_dir(&*self.path).map_err(folder)? {
            // Names that are not UTF-8 are not ours.
            if let Ok(name) = entry.map_err(folder)?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn len(&self, name: &str) -> Result<u64, StorageError> {
        let file = self.file(name, false)?;
        file.metadata().map(|metadata| metadata.len()).map_err(|error| storage_error(name, error))
    }

    fn read(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<usize, StorageError> {
        let file = self.file(name, false)?;
        read_full(&file, offset, buf).map_err(|error| storage_error(name, error))
    }

    fn write(&mut self, name: &str, offset: u64, data: &[u8]) -> Result<(), StorageError> {
        let file = self.file(name, true)?;
        self.noted(name, file.write_all_at(data, offset))
    }

    fn zero(&mut self, name: &str, offset: u64, length: u64) -> Result<(), StorageError> {
        let file = self.file(name, true)?;
        let grown = file
            .metadata()
            .and_then(|metadata| if metadata.len() < offset + length { file.set_len(offset + length) } else { Ok(()) });
        self.noted(name, grown)?;
        self.noted(name, zero_range(&file, offset, length))
    }

    fn sync(&mut self, name: &str) -> Result<(), StorageError> {
        let file = self.file(name, false)?;
        let synced = file.sync_data();
        let mut shared = self.lock();
        match synced {
            Ok(()) => {
                shared.dirty.remove(name);
                Ok(())
            }
            Err(error) => {
                shared.poisoned.insert(name.into());
                Err(sync_error(name, error))
            }
        }
    }

    fn truncate(&mut self, name: &str, length: u64) -> Result<(), StorageError> {
        let file = self.file(name, true)?;
        self.noted(name, file.set_len(length))
    }

    fn remove(&mut self, name: &str) -> Result<(), StorageError> {
        let place = self.place(name)?;
        let mut shared = self.lock();
        shared.files.remove(name);
        shared.dirty.remove(name);
        drop(shared);
        fs::remove_file(place).map_err(|error| storage_error(name, error))
    }

    fn sync_folder(&mut self) -> Result<(), StorageError> {
        let folder = File::open(&*self.path).map_err(|error| sync_error(".", error))?;
        folder.sync_all().map_err(|error| sync_error(".", error))
    }
}

/// The disk images of one VM: `disk.img` files or block devices. Clones share descriptors and failures.
#[derive(Clone, Debug)]
pub struct DiskImages {
    disks: Arc<Vec<Image>>,
    poisoned: Arc<Mutex<BTreeSet<u16>>>,
}

#[derive(Debug)]
struct Image {
    name: String,
    file: File,
    device: bool,
}

impl DiskImages {
    /// Open existing images, in the order of the pair's disks.
    pub fn open<P: AsRef<Path>>(paths: &[P], read_only: bool) -> io::Result<DiskImages> {
        let open = |path: &P| -> io::Result<Image> {
            let path = path.as_ref();
            let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
            let file = OpenOptions::new().read(true).write(!read_only).open(path).map_err(named)?;
            let kind = file.metadata().map_err(named)?.file_type();
            if !kind.is_file() && !kind.is_block_device() {
                return Err(named(io::Error::other("neither a regular file nor a block device")));
            }
            Ok(Image { name: path.display().to_string(), file, device: kind.is_block_device() })
        };
        let disks = paths.iter().map(open).collect::<io::Result<Vec<Image>>>()?;
        Ok(DiskImages { disks: Arc::new(disks), poisoned: Arc::default() })
    }

    /// Create an empty (sparse) image file of this size, durably. Refuses an existing one.
    pub fn create_file(path: &Path, bytes: u64) -> io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        file.set_len(bytes)?;
        file.sync_all()?;
        match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
            _ => File::open(".")?.sync_all(),
        }
    }

    fn image(&self, disk: DiskIndex) -> Result<&Image, StorageError> {
        let image = self
            .disks
            .get(usize::from(disk.0))
            .ok_or_else(|| StorageError::Missing(format!("image of disk {}", disk.0)))?;
        if self.lock().contains(&disk.0) {
            return Err(StorageError::Io(image.name.clone(), "closed since an earlier failure".into()));
        }
        Ok(image)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<u16>> {
        // A set of numbers is consistent at every point where a panic could come.
        self.poisoned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn noted(&self, disk: DiskIndex, outcome: Result<(), StorageError>) -> Result<(), StorageError> {
        if matches!(outcome, Err(StorageError::Io(..))) {
            self.lock().insert(disk.0);
        }
        outcome
    }
}

impl Images for DiskImages {
    fn size_bytes(&self, disk: DiskIndex) -> Result<u64, StorageError> {
        let image = self.image(disk)?;
        let size = if image.device {
            // A device's length is where its end is; the metadata says 0.
            rustix::fs::seek(&image.file, rustix::fs::SeekFrom::End(0)).map_err(io::Error::from)
        } else {
            image.file.metadata().map(|metadata| metadata.len())
        };
        size.map_err(|error| storage_error(&image.name, error))
    }

    fn read(&self, disk: DiskIndex, offset: u64, buf: &mut [u8]) -> Result<(), StorageError> {
        let image = self.image(disk)?;
        let read = read_full(&image.file, offset, buf).map_err(|error| storage_error(&image.name, error))?;
        buf[read..].fill(0);
        Ok(())
    }

    fn write(&mut self, disk: DiskIndex, offset: u64, data: &[u8]) -> Result<(), StorageError> {
        let image = self.image(disk)?;
        let written = image.file.write_all_at(data, offset).map_err(|error| storage_error(&image.name, error));
        self.noted(disk, written)
    }

    fn zero(&mut self, disk: DiskIndex, offset: u64, length: u64) -> Result<(), StorageError> {
        let image = self.image(disk)?;
        let zeroed = zero_range(&image.file, offset, length).map_err(|error| storage_error(&image.name, error));
        self.noted(disk, zeroed)
    }

    fn sync(&mut self, disk: DiskIndex) -> Result<(), StorageError> {
        let image = self.image(disk)?;
        let synced = image.file.sync_data().map_err(|error| sync_error(&image.name, error));
        self.noted(disk, synced)
    }

    fn grow(&mut self, disk: DiskIndex, bytes: u64) -> Result<(), StorageError> {
        let size = self.size_bytes(disk)?;
        let image = self.image(disk)?;
        if size >= bytes {
            return Ok(());
        }
        if image.device {
            let what = format!("the device has {size} bytes, {bytes} are needed");
            return Err(StorageError::Io(image.name.clone(), what));
        }
        let grown = image.file.set_len(bytes).map_err(|error| storage_error(&image.name, error));
        self.noted(disk, grown)
    }
}
