//! A raw NBD client that can be as wrong as it likes, and a disk in memory that can hold, fail and count.

#![allow(dead_code, clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use watari_core::front::{Allocation, Detach, DiskInfo, Errno, GuestDisk, Op, Request};
use watari_core::nbd::wire::*;
use watari_nbd::{ExportTable, Limits, Server, ServerConfig};

/// A disk in memory.
pub struct MemoryDisk {
    name: String,
    pub data: Mutex<Vec<u8>>,
    read_only: bool,
    /// Keep requests instead of doing them, until [`MemoryDisk::release`].
    pub hold: AtomicBool,
    pub held: Mutex<Vec<Request>>,
    /// Fail everything with this.
    pub fail: Mutex<Option<Errno>>,
    pub refuse: Mutex<Option<String>>,
    pub attached: Mutex<Vec<u64>>,
    pub detached: Mutex<Vec<(u64, Detach)>>,
    pub flushes: AtomicUsize,
    pub durable_writes: AtomicUsize,
    pub submitted: AtomicUsize,
}

impl MemoryDisk {
    pub fn new(name: &str, bytes: usize) -> Arc<Self> {
        Self::build(name, bytes, false)
    }

    pub fn read_only(name: &str, bytes: usize) -> Arc<Self> {
        Self::build(name, bytes, true)
    }

    fn build(name: &str, bytes: usize, read_only: bool) -> Arc<Self> {
        Arc::new(MemoryDisk {
            name: name.into(),
            data: Mutex::new(vec![0; bytes]),
            read_only,
            hold: AtomicBool::new(false),
            held: Mutex::new(Vec::new()),
            fail: Mutex::new(None),
            refuse: Mutex::new(None),
            attached: Mutex::new(Vec::new()),
            detached: Mutex::new(Vec::new()),
            flushes: AtomicUsize::new(0),
            durable_writes: AtomicUsize::new(0),
            submitted: AtomicUsize::new(0),
        })
    }

    /// Do what was held, last first, on this thread.
    pub fn release(&self) {
        self.hold.store(false, Ordering::SeqCst);
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        for request in held.into_iter().rev() {
            self.execute(request);
        }
    }

    fn execute(&self, mut request: Request) {
        let failure = *self.fail.lock().unwrap();
        let range = request.offset as usize..(request.offset + request.length) as usize;
        if failure.is_none() {
            let mut data = self.data.lock().unwrap();
            match request.op {
                Op::Read => request.data.copy_from_slice(&data[range]),
                Op::Write => data[range].copy_from_slice(&request.data),
                Op::Discard | Op::WriteZeroes { .. } => data[range].fill(0),
                Op::Flush => {
                    self.flushes.fetch_add(1, Ordering::SeqCst);
                }
                Op::Cache => {}
            }
            if request.fua {
                self.durable_writes.fetch_add(1, Ordering::SeqCst);
            }
        }
        let Request { id, data, reply, .. } = request;
        reply.complete(id, failure.map_or(Ok(()), Err), data);
    }
}

impl GuestDisk for MemoryDisk {
    fn info(&self) -> DiskInfo {
        let size_bytes = self.data.lock().unwrap().len() as u64;
        DiskInfo { name: self.name.clone(), size_bytes, read_only: self.read_only }
    }
    fn attach(&self, connection: u64) -> Result<(), String> {
        if let Some(reason) = self.refuse.lock().unwrap().clone() {
            return Err(reason);
        }
        self.attached.lock().unwrap().push(connection);
        Ok(())
    }
    fn detach(&self, connection: u64, how: Detach) {
        self.detached.lock().unwrap().push((connection, how));
    }
    fn submit(&self, request: Request) {
        self.submitted.fetch_add(1, Ordering::SeqCst);
        if self.hold.load(Ordering::SeqCst) {
            self.held.lock().unwrap().push(request);
        } else {
            self.execute(request);
        }
    }
    fn allocation(&self, _offset: u64, length: u64) -> Result<Vec<Allocation>, Errno> {
        Ok(vec![Allocation { length, hole: false, zero: false }])
    }
}

/// A server in a folder of its own.
pub struct Rig {
    pub server: Server,
    pub path: PathBuf,
    pub folder: tempfile::TempDir,
}

impl Rig {
    pub fn new(disk: Arc<dyn GuestDisk>) -> Rig {
        Self::with(disk, Limits::default())
    }

    pub fn with(disk: Arc<dyn GuestDisk>, limits: Limits) -> Rig {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nbd.sock");
        let config = ServerConfig { limits, ..ServerConfig::new(&path) };
        let server = Server::bind(config, Arc::new(ExportTable::of(disk))).unwrap();
        server.serve().unwrap();
        Rig { server, path, folder }
    }

    pub fn client(&self) -> Client {
        Client::enter(&self.path, true)
    }
}

/// Wait for something to become true, or fail saying what did not.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A request under way, as the client remembers it.
struct Asked {
    kind: u16,
    offset: u64,
    data: Vec<u8>,
    covered: usize,
    extents: Vec<(u32, u32)>,
    errno: u32,
}

/// A finished request.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub cookie: u64,
    /// Content of a read, or the errno.
    pub result: Result<Vec<u8>, u32>,
    /// (length, state) of a block status.
    pub extents: Vec<(u32, u32)>,
    /// Content chunks and hole chunks that a read came in.
    pub chunks: (usize, usize),
}

/// A client that checks every byte that it gets, and sends whatever it is told to.
pub struct Client {
    pub stream: UnixStream,
    pub structured: bool,
    pub size_bytes: u64,
    pub flags: u16,
    asked: HashMap<u64, Asked>,
    chunks: HashMap<u64, (usize, usize)>,
    next_cookie: u64,
}

impl Client {
    /// Connect and finish the greeting, nothing else.
    pub fn greet(path: &Path) -> Client {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(greeting[..8], NBD_MAGIC.to_be_bytes());
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        Client {
            stream,
            structured: false,
            size_bytes: 0,
            flags: 0,
            asked: HashMap::new(),
            chunks: HashMap::new(),
            next_cookie: 1,
        }
    }

    /// Into transmission with the default export, all features or none.
    pub fn enter(path: &Path, structured: bool) -> Client {
        let mut client = Self::greet(path);
        if structured {
            assert_eq!(client.option(OPT_STRUCTURED_REPLY, &[]).unwrap()[0].0, REP_ACK);
            client.structured = true;
            let mut query = 0u32.to_be_bytes().to_vec();
            query.extend_from_slice(&1u32.to_be_bytes());
            query.extend_from_slice(&(BASE_ALLOCATION.len() as u32).to_be_bytes());
            query.extend_from_slice(BASE_ALLOCATION.as_bytes());
            assert_eq!(client.option(OPT_SET_META_CONTEXT, &query).unwrap()[0].0, REP_META_CONTEXT);
        }
        let replies = client.option(OPT_GO, &[0; 6]).unwrap();
        assert_eq!(replies.last().unwrap().0, REP_ACK, "{replies:?}");
        let info = &replies[0].1;
        client.size_bytes = u64::from_be_bytes(info[2..10].try_into().unwrap());
        client.flags = u16::from_be_bytes(info[10..12].try_into().unwrap());
        client
    }

    /// Send an option and read its replies; `None` if the server closed instead.
    pub fn option(&mut self, number: u32, data: &[u8]) -> Option<Vec<(u32, Vec<u8>)>> {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&number.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes).ok()?;
        let mut replies = Vec::new();
        loop {
            let mut header = [0; 20];
            self.stream.read_exact(&mut header).ok()?;
            assert_eq!(header[..8], OPTION_REPLY_MAGIC.to_be_bytes());
            let kind = u32::from_be_bytes(header[12..16].try_into().unwrap());
            let mut body = vec![0; u32::from_be_bytes(header[16..].try_into().unwrap()) as usize];
            self.stream.read_exact(&mut body).ok()?;
            replies.push((kind, body));
            if kind == REP_ACK || kind >> 31 == 1 {
                return Some(replies);
            }
        }
    }

    /// The bytes of a request header.
    pub fn header(flags: u16, kind: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes
    }

    /// Remember a request and return its bytes; the caller sends them.
    pub fn ask(&mut self, flags: u16, kind: u16, offset: u64, length: u32, payload: &[u8]) -> (u64, Vec<u8>) {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let data = if kind == CMD_READ { vec![0xcc; length as usize] } else { Vec::new() };
        let asked = Asked { kind, offset, data, covered: 0, extents: Vec::new(), errno: 0 };
        self.asked.insert(cookie, asked);
        let mut bytes = Self::header(flags, kind, cookie, offset, length);
        bytes.extend_from_slice(payload);
        (cookie, bytes)
    }

    pub fn send(&mut self, flags: u16, kind: u16, offset: u64, length: u32, payload: &[u8]) -> u64 {
        let (cookie, bytes) = self.ask(flags, kind, offset, length, payload);
        self.stream.write_all(&bytes).unwrap();
        cookie
    }

    /// One request, one answer.
    pub fn call(&mut self, flags: u16, kind: u16, offset: u64, length: u32, payload: &[u8]) -> Answer {
        let cookie = self.send(flags, kind, offset, length, payload);
        let answer = self.answer().expect("an answer");
        assert_eq!(answer.cookie, cookie);
        answer
    }

    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        self.call(0, CMD_READ, offset, length, &[]).result
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), u32> {
        self.call(0, CMD_WRITE, offset, data.len() as u32, data).result.map(|_| ())
    }

    /// Whether the server has closed, without having said anything.
    pub fn closed(&mut self) -> bool {
        let mut byte = [0];
        matches!(self.stream.read(&mut byte), Ok(0) | Err(_))
    }

    fn exact(&mut self, bytes: &mut [u8]) -> Option<()> {
        self.stream.read_exact(bytes).ok()
    }

    /// The next finished request, in whatever order; `None` if the server closed.
    pub fn answer(&mut self) -> Option<Answer> {
        loop {
            let mut magic = [0; 4];
            self.exact(&mut magic)?;
            let cookie = match u32::from_be_bytes(magic) {
                SIMPLE_REPLY_MAGIC => self.simple()?,
                STRUCTURED_REPLY_MAGIC => match self.chunk()? {
                    Some(cookie) => cookie,
                    None => continue,
                },
                other => panic!("not a reply: {other:#x}"),
            };
            let asked = self.asked.remove(&cookie).expect("a known cookie");
            let chunks = self.chunks.remove(&cookie).unwrap_or_default();
            if asked.errno == 0 && asked.kind == CMD_READ {
                assert_eq!(asked.covered, asked.data.len(), "the whole range was described");
            }
            let result = if asked.errno == 0 { Ok(asked.data) } else { Err(asked.errno) };
            return Some(Answer { cookie, result, extents: asked.extents, chunks });
        }
    }

    fn simple(&mut self) -> Option<u64> {
        let mut rest = [0; 12];
        self.exact(&mut rest)?;
        let cookie = u64::from_be_bytes(rest[4..].try_into().unwrap());
        let errno = u32::from_be_bytes(rest[..4].try_into().unwrap());
        let mut asked = self.asked.remove(&cookie).expect("a known cookie");
        asked.errno = errno;
        if asked.kind == CMD_READ {
            assert!(!self.structured, "a read is answered with chunks");
            if errno == 0 {
                self.exact(&mut asked.data)?;
                asked.covered = asked.data.len();
            }
        }
        self.asked.insert(cookie, asked);
        Some(cookie)
    }

    /// One chunk; the cookie if it was the last of its reply.
    fn chunk(&mut self) -> Option<Option<u64>> {
        assert!(self.structured, "chunks were not negotiated");
        let mut rest = [0; 16];
        self.exact(&mut rest)?;
        let flags = u16::from_be_bytes(rest[..2].try_into().unwrap());
        let kind = u16::from_be_bytes(rest[2..4].try_into().unwrap());
        let cookie = u64::from_be_bytes(rest[4..12].try_into().unwrap());
        let mut body = vec![0; u32::from_be_bytes(rest[12..].try_into().unwrap()) as usize];
        self.exact(&mut body)?;
        let asked = self.asked.get_mut(&cookie).expect("a known cookie");
        let be32 = |at: usize| u32::from_be_bytes(body[at..at + 4].try_into().unwrap());
        let place = |length: usize| {
            let at = (u64::from_be_bytes(body[..8].try_into().unwrap()) - asked.offset) as usize;
            at..at + length
        };
        let chunks = self.chunks.entry(cookie).or_default();
        match kind {
            REPLY_TYPE_NONE => {}
            REPLY_TYPE_OFFSET_DATA => {
                let range = place(body.len() - 8);
                assert!(!range.is_empty());
                asked.covered += range.len();
                asked.data[range].copy_from_slice(&body[8..]);
                chunks.0 += 1;
            }
            REPLY_TYPE_OFFSET_HOLE => {
                let range = place(be32(8) as usize);
                assert!(!range.is_empty());
                asked.covered += range.len();
                asked.data[range].fill(0);
                chunks.1 += 1;
            }
            REPLY_TYPE_BLOCK_STATUS => {
                assert_eq!(be32(0), BASE_ALLOCATION_ID);
                asked.extents = (4..body.len()).step_by(8).map(|at| (be32(at), be32(at + 4))).collect();
            }
            REPLY_TYPE_ERROR => asked.errno = be32(0),
            other => panic!("chunk type {other}"),
        }
        Some((flags & REPLY_FLAG_DONE != 0).then_some(cookie))
    }
}
