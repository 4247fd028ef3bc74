//! Following what was asked for until it has happened: `cutover` and `failover` print each change once and end by the same rules.

use std::fmt::Debug;
use std::io::Write;
use std::time::{Duration, Instant};

use kube::Api;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::cli::Output;
use super::{Error, Outcome, api_error};

/// How often the object is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Where a move or a failover stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "state", content = "words")]
pub enum Standing {
    UnderWay(String),
    /// It waits for something, or an attempt failed and another one follows.
    HeldUp(String),
    Done(String),
}

/// What is followed, and for how long.
pub struct Followed<'a> {
    /// For errors: "the SyncPair".
    pub what: &'static str,
    pub name: &'a str,
    /// Ends at the first look.
    pub no_wait: bool,
    pub timeout_seconds: u64,
    pub output: Output,
}

/// Looks until it is done, or the time is over. `observed`: the generation of which the status speaks; a status that speaks of an older spec
/// says nothing about this wish.
pub async fn follow<K>(
    api: &Api<K>,
    followed: &Followed<'_>,
    observed: impl Fn(&K) -> Option<i64>,
    standing: impl Fn(&K) -> Standing,
    out: &mut impl Write,
) -> Result<Outcome, Error>
where
    K: kube::Resource + Clone + DeserializeOwned + Debug,
{
    let begin = Instant::now();
    let mut said = None;
    loop {
        let object = api.get(followed.name).await.map_err(api_error(followed.what))?;
        let now = match object.meta().generation == observed(&object) {
            true => standing(&object),
            false => Standing::HeldUp("The operator has not looked at it yet.".to_owned()),
        };
        if said.as_ref() != Some(&now) {
            print(begin.elapsed(), &now, followed.output, out)?;
            said = Some(now.clone());
        }
        match now {
            Standing::Done(_) => return Ok(Outcome::Well),
            Standing::UnderWay(_) | Standing::HeldUp(_) if followed.no_wait => return Ok(Outcome::Well),
            Standing::UnderWay(_) | Standing::HeldUp(_) if begin.elapsed().as_secs() >= followed.timeout_seconds => {
                return Ok(Outcome::NotWell);
            }
            Standing::UnderWay(_) | Standing::HeldUp(_) => tokio::time::sleep(LOOK).await,
        }
    }
}

/// One line.
pub fn print(elapsed: Duration, now: &Standing, output: Output, out: &mut impl Write) -> Result<(), Error> {
    match (output, now) {
        (Output::Json, _) => writeln!(out, "{}", serde_json::to_string(now)?)?,
        (Output::Table, Standing::UnderWay(words) | Standing::HeldUp(words) | Standing::Done(words)) => {
            writeln!(out, "{:>4} s  {words}", elapsed.as_secs())?;
        }
    }
    Ok(out.flush()?)
}
