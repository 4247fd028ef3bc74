//! The control socket of a running link: one command per line, one JSON object per line as the answer.
//!
//! ```text
//! set both rate=100M delay=85ms jitter=2ms loss=0.1% queue=256K reorder=on
//! set a-to-b rate=off
//! cut                    both directions, silently
//! black-hole a-to-b      one direction, silently
//! down                   unplug the cables
//! restore                end all of these
//! stats
//! ```
//! Rates are bits per second (k, M, G are powers of 1000), queues bytes (K, M powers of 1024).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Direction, Error, IDLE, Shape, Shared};

/// A control client that sends nothing for this long is hung up on.
const CLIENT_PATIENCE: Duration = Duration::from_secs(60);

/// A parsed command.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    Set { directions: Vec<Direction>, settings: Vec<Setting> },
    Cut,
    BlackHole(Direction),
    Down,
    Restore,
    Stats,
}

/// One `name=value` of `set`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Setting {
    Rate(Option<u64>),
    Delay(Duration),
    Jitter(Duration),
    Loss(f64),
    QueueBytes(u64),
    Reorder(bool),
}

impl Setting {
    /// Changes a shape accordingly.
    pub fn apply(self, shape: &mut Shape) {
        match self {
            Setting::Rate(rate) => shape.rate = rate,
            Setting::Delay(delay) => shape.delay = delay,
            Setting::Jitter(jitter) => shape.jitter = jitter,
            Setting::Loss(loss) => shape.loss = loss,
            Setting::QueueBytes(bytes) => shape.queue_bytes = bytes,
            Setting::Reorder(reorder) => shape.reorder = reorder,
        }
    }
}

fn number(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let (digits, factor) =
        units.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, *factor))).unwrap_or((text, 1.0));
    digits.parse::<f64>().ok().filter(|value| value.is_finite() && *value >= 0.0).map(|value| value * factor)
}

fn duration(text: &str) -> Option<Duration> {
    number(text, &[("us", 1e-6), ("ms", 1e-3), ("s", 1.0)]).map(Duration::from_secs_f64)
}

impl std::str::FromStr for Setting {
    type Err = String;
    fn from_str(text: &str) -> Result<Setting, String> {
        let (name, value) = text.split_once('=').ok_or_else(|| format!("{text} is not name=value"))?;
        let parsed = match (name, value) {
            ("rate", "off") => Some(Setting::Rate(None)),
            ("rate", _) => number(value, &[("k", 1e3), ("M", 1e6), ("G", 1e9)])
                .filter(|rate| *rate >= 1.0)
                .map(|rate| Setting::Rate(Some(rate as u64))),
            ("delay", _) => duration(value).map(Setting::Delay),
            ("jitter", _) => duration(value).map(Setting::Jitter),
            ("loss", _) => number(value, &[("%", 0.01)]).filter(|loss| *loss <= 1.0).map(Setting::Loss),
            ("queue", _) => {
                number(value, &[("K", 1024.0), ("M", 1048576.0)]).map(|bytes| Setting::QueueBytes(bytes as u64))
            }
            ("reorder", "on") => Some(Setting::Reorder(true)),
            ("reorder", "off") => Some(Setting::Reorder(false)),
            _ => None,
        };
        parsed.ok_or_else(|| format!("cannot understand {text} (known: rate, delay, jitter, loss, queue, reorder)"))
    }
}

impl std::str::FromStr for Command {
    type Err = String;
    fn from_str(line: &str) -> Result<Command, String> {
        let mut words = line.split_whitespace();
        match (words.next().unwrap_or_default(), words.next()) {
            ("set", Some(directions)) => Ok(Command::Set {
                directions: if directions == "both" { Direction::BOTH.to_vec() } else { vec![directions.parse()?] },
                settings: words.map(str::parse).collect::<Result<_, _>>()?,
            }),
            ("cut", None) => Ok(Command::Cut),
            ("black-hole", Some(direction)) => Ok(Command::BlackHole(direction.parse()?)),
            ("down", None) => Ok(Command::Down),
            ("restore", None) => Ok(Command::Restore),
            ("stats", None) => Ok(Command::Stats),
            _ => Err(format!("unknown command {line:?} (known: set, cut, black-hole, down, restore, stats)")),
        }
    }
}

fn perform(shared: &Shared, command: Command) -> Result<(), String> {
    let cut = |directions: &[Direction], cut: bool| {
        directions.iter().for_each(|direction| shared.change(*direction, |shape| shape.cut = cut));
    };
    match command {
        Command::Set { directions, settings } => {
            for direction in directions {
                shared.change(direction, |shape| settings.iter().for_each(|setting| setting.apply(shape)));
            }
        }
        Command::Cut => cut(&Direction::BOTH, true),
        Command::BlackHole(direction) => cut(&[direction], true),
        Command::Down => {
            cut(&Direction::BOTH, true);
            shared.set_carrier(false).map_err(|error| error.to_string())?;
        }
        Command::Restore => {
            cut(&Direction::BOTH, false);
            shared.set_carrier(true).map_err(|error| error.to_string())?;
        }
        Command::Stats => {}
    }
    Ok(())
}

/// Listens on `path` (replaced if it exists) until the link ends.
pub(super) fn serve(shared: Arc<Shared>, path: PathBuf) -> Result<JoinHandle<()>, Error> {
    let fail = |source| Error::Control { path: path.clone(), source };
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(fail)?;
    listener.set_nonblocking(true).map_err(fail)?;
    Ok(std::thread::spawn(move || {
        while !shared.stop.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((client, _)) => {
                    let shared = Arc::clone(&shared);
                    std::thread::spawn(move || serve_client(&shared, &client));
                }
                Err(_) => std::thread::sleep(IDLE),
            }
        }
        let _ = std::fs::remove_file(&path);
    }))
}

fn serve_client(shared: &Shared, client: &UnixStream) {
    // An accepted socket does not inherit O_NONBLOCK on Linux; the timeout bounds this thread's life.
    let _ = client.set_read_timeout(Some(CLIENT_PATIENCE));
    for line in BufReader::new(client).lines() {
        let Ok(line) = line else { return };
        let answer = match line.parse().and_then(|command| perform(shared, command)) {
            Ok(()) => serde_json::to_string(&shared.report()).unwrap_or_default(),
            Err(error) => serde_json::json!({ "error": error }).to_string(),
        };
        if writeln!(&mut &*client, "{answer}").is_err() {
            return;
        }
    }
}

/// Sends one command to a running link and returns its answer.
pub fn ask(path: &Path, command: &str) -> std::io::Result<String> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    writeln!(&mut &stream, "{command}")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_in_the_header_are_understood() {
        let text = include_str!("control.rs");
        let start = text.find("```text").expect("the header has an example");
        let commands = text[start..].lines().skip(1).map(|line| line.trim_start_matches("//!").trim());
        for line in commands.take_while(|line| *line != "```") {
            let command = line.split("   ").next().expect("split yields at least one");
            assert!(command.parse::<Command>().is_ok(), "{command}: {:?}", command.parse::<Command>());
        }
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        for line in
            ["", "set", "set both rate=fast", "set c-to-d rate=1M", "set both loss=200%", "cut now", "frobnicate"]
        {
            assert!(line.parse::<Command>().is_err(), "{line}");
        }
    }
}
