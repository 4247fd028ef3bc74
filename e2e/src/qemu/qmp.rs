//! A blocking QMP client: one command at a time, events collected by a reader thread.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Error;

/// Commands answer at once or have hung; migrations report by events.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// Something QEMU reported by itself.
#[derive(Clone, Debug)]
pub struct Event {
    pub name: String,
    pub data: Value,
    /// Seconds since 1970 by the host's clock: comparable between the QEMUs of one host.
    pub seconds: f64,
}

#[derive(Default)]
struct State {
    answers: Vec<Value>,
    events: Vec<Event>,
    closed: bool,
}

type Inbox = Arc<(Mutex<State>, Condvar)>;

/// A connection to one QEMU.
pub struct Qmp {
    machine: String,
    writer: Mutex<(UnixStream, u64)>,
    inbox: Inbox,
}

impl Qmp {
    /// Connects and leaves the negotiation mode.
    pub fn connect(machine: &str, socket: &Path) -> Result<Qmp, Error> {
        let fail = |source| Error::Connection { machine: machine.to_owned(), source };
        let stream = UnixStream::connect(socket).map_err(fail)?;
        let reader = stream.try_clone().map_err(fail)?;
        let inbox = Inbox::default();
        let shared = Arc::clone(&inbox);
        std::thread::spawn(move || read(reader, &shared));
        let qmp = Qmp { machine: machine.to_owned(), writer: Mutex::new((stream, 0)), inbox };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns its answer.
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value, Error> {
        let mut writer = self.writer.lock().expect("holders return errors, they do not panic");
        writer.1 += 1;
        let id = writer.1;
        let request = json!({ "execute": command, "arguments": arguments, "id": id });
        let fail = |source| Error::Connection { machine: self.machine.clone(), source };
        writeln!(writer.0, "{request}").map_err(fail)?;
        let answer = self.wait(COMMAND_TIMEOUT, |state| {
            let at = state.answers.iter().position(|answer| answer["id"] == json!(id))?;
            Some(state.answers.swap_remove(at))
        });
        let Some(mut answer) = answer else {
            let seconds = COMMAND_TIMEOUT.as_secs_f64();
            return Err(Error::NoAnswer { machine: self.machine.clone(), command: command.to_owned(), seconds });
        };
        match answer.get("error") {
            None => Ok(answer["return"].take()),
            Some(error) => Err(Error::Refused {
                machine: self.machine.clone(),
                command: command.to_owned(),
                class: error["class"].as_str().unwrap_or_default().to_owned(),
                message: error["desc"].as_str().unwrap_or_default().to_owned(),
            }),
        }
    }

    /// How many events came so far: a mark for [`Qmp::wait_event`].
    pub fn mark(&self) -> usize {
        self.inbox.0.lock().expect("holders do not panic").events.len()
    }

    /// All events after a mark.
    pub fn events_since(&self, mark: usize) -> Vec<Event> {
        self.inbox.0.lock().expect("holders do not panic").events[mark..].to_vec()
    }

    /// The first event after `mark` that `wanted` accepts.
    pub fn wait_event(
        &self,
        what: &str,
        mark: usize,
        timeout: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event, Error> {
        self.wait(timeout, |state| state.events[mark..].iter().find(|event| wanted(event)).cloned()).ok_or_else(|| {
            let said: Vec<String> =
                self.events_since(mark).iter().map(|event| format!("{} {}", event.name, event.data)).collect();
            let (machine, event) = (self.machine.clone(), what.to_owned());
            Error::NoEvent { machine, event, seconds: timeout.as_secs_f64(), said: said.join("; ") }
        })
    }

    fn wait<T>(&self, timeout: Duration, mut find: impl FnMut(&mut State) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + timeout;
        let (state, changed) = &*self.inbox;
        let mut state = state.lock().expect("holders do not panic");
        loop {
            if let Some(found) = find(&mut state) {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.closed {
                return None;
            }
            state = changed.wait_timeout(state, left).expect("holders do not panic").0;
        }
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        if let Ok(writer) = self.writer.lock() {
            let _ = writer.0.shutdown(std::net::Shutdown::Both);
        }
    }
}

fn read(stream: UnixStream, inbox: &Inbox) {
    let (state, changed) = &**inbox;
    for line in BufReader::new(stream).lines() {
        let Some(message) = line.ok().and_then(|line| serde_json::from_str::<Value>(&line).ok()) else { break };
        let mut state = state.lock().expect("holders do not panic");
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            let stamp = &message["timestamp"];
            let part = |name: &str| stamp[name].as_f64().unwrap_or(0.0);
            let seconds = part("seconds") + part("microseconds") / 1e6;
            state.events.push(Event { name: name.to_owned(), data: message["data"].clone(), seconds });
        } else if message.get("QMP").is_none() {
            state.answers.push(message);
        }
        changed.notify_all();
    }
    state.lock().expect("holders do not panic").closed = true;
    changed.notify_all();
}
