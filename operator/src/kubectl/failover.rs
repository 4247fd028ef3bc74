//! `failover`, at the peer: says what would be lost, asks, writes the wish, and follows it to its end.
//!
//! The wish is the SyncReplica's `spec.promote`, with `atMove` filled in; whoever watches may go away, the failover goes on.

use std::io::{BufRead, IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use watari_crds::conditions::{Kind, Status};
use watari_crds::failover::FailoverStage;
use watari_crds::replica::SyncReplica;

use super::cli::Output;
use super::follow::{Followed, Standing, follow, print};
use super::table::seconds;
use super::{Error, Outcome, api_error};
use crate::side::accepts_writes;

#[derive(Args, Debug)]
#[command(
    after_help = "Run it against the peer's cluster. If the home still answers, it is sealed first and nothing is lost; `kubectl watari cutover` \
                  there moves the VM without a restart."
)]
pub struct Failover {
    /// The SyncReplica, named like the pair.
    pub name: String,
    /// The namespace of the replica. Default: that of the context.
    #[arg(long, short, value_name = "NAME")]
    pub namespace: Option<String>,
    /// Boot from this kept generation, EPOCH.NUMBER, instead of the newest; the home is then not asked for what it has written since.
    #[arg(long, value_name = "GENERATION")]
    pub generation: Option<String>,
    /// Do not ask.
    #[arg(long, short)]
    pub yes: bool,
    /// Ask for it and return.
    #[arg(long)]
    pub no_wait: bool,
    /// How long to follow it, seconds; afterwards the exit code is 3 and the failover goes on.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub timeout_seconds: u64,
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    pub output: Output,
}

/// What a failover now would mean.
#[derive(Clone, Debug, PartialEq)]
pub enum Prospect {
    /// It would do this.
    Possible(Vec<(&'static str, String)>),
    /// It is done already.
    Nothing(String),
    /// It cannot be done.
    Impossible(String),
}

/// Reads it from a replica.
pub fn prospect(replica: &SyncReplica, generation: Option<&str>, now: Timestamp) -> Prospect {
    let (spec, status) = (&replica.spec, replica.status.clone().unwrap_or_default());
    if status.role.as_deref().is_some_and(accepts_writes) {
        return Prospect::Nothing(format!("VM {} is active here, at {}, already.", spec.vm_name, spec.site));
    }
    if let Some(asked) = generation.filter(|asked| !status.kept.iter().any(|kept| kept == asked)) {
        return Prospect::Impossible(format!(
            "generation {asked} is not kept here; kept are {}",
            status.kept.join(", ")
        ));
    }
    let Some(committed) = status.committed.clone() else {
        return Prospect::Impossible(
            "no generation is whole here: there is nothing from which the VM could boot".into(),
        );
    };
    let age = status.committed_time.map(|at| seconds(now.duration_since(at).as_secs()));
    let whole = age.as_ref().map_or(committed.clone(), |age| format!("{committed}, whole here for {age}"));
    let lost = match (generation, status.home_answers, age) {
        (Some(asked), _, _) => format!("everything written after generation {asked}"),
        (None, true, _) => {
            format!("nothing, if {} goes on answering: it is stopped and sends the rest first", spec.home_site)
        }
        (None, false, Some(age)) => format!("everything written in the last {age}, and shortly before"),
        (None, false, None) => format!("everything written after generation {committed}"),
    };
    let home = match status.home_answers {
        true => format!("{} answers: `kubectl watari cutover` there moves the VM without a restart", spec.home_site),
        false => format!("{} does not answer; if it runs on, it is stopped when they meet again", spec.home_site),
    };
    Prospect::Possible(vec![
        ("VM", format!("{} boots at {}, as after a power failure", spec.vm_name, spec.site)),
        ("from", generation.map_or(whole, str::to_owned)),
        ("lost", lost),
        ("home", home),
    ])
}

/// Reads how far it is from a replica that was asked at `at_move`.
pub fn standing(replica: &SyncReplica, at_move: i64) -> Standing {
    let status = replica.status.clone().unwrap_or_default();
    match status.failover.filter(|failover| failover.at_move == at_move) {
        Some(failover) => {
            let words = format!("{:?}: {}", failover.stage, failover.message);
            match failover.stage {
                FailoverStage::Refused => Standing::HeldUp(words),
                FailoverStage::Clearing | FailoverStage::Promoting | FailoverStage::Starting => {
                    Standing::UnderWay(words)
                }
                FailoverStage::Done => {
                    let took = failover.ended.map(|ended| ended.as_second() - failover.began.as_second());
                    let took = took.map(|took| format!(" after {took} s")).unwrap_or_default();
                    Standing::Done(format!("VM {} is active at {}{took}.", replica.spec.vm_name, replica.spec.site))
                }
            }
        }
        None => {
            let differs = |kind: &str| kind == Kind::SiteDiffers.name();
            let said = status.conditions.iter().find(|it| differs(&it.kind) && it.status == Status::True);
            Standing::HeldUp(said.map_or("The operator has not taken it up yet.".to_owned(), |it| it.message.clone()))
        }
    }
}

/// Shows, asks, and follows.
pub async fn run(api: &Api<SyncReplica>, asked: &Failover, out: &mut impl Write) -> Result<Outcome, Error> {
    let replica = api.get(&asked.name).await.map_err(api_error("the SyncReplica"))?;
    let plan = match prospect(&replica, asked.generation.as_deref(), Timestamp::now()) {
        Prospect::Possible(plan) => plan,
        Prospect::Nothing(words) => {
            print(Duration::ZERO, &Standing::Done(words), asked.output, out)?;
            return Ok(Outcome::Well);
        }
        Prospect::Impossible(why) => return Err(Error::Refused(why)),
    };
    show(&plan, asked.output, out)?;
    if !asked.yes {
        confirm(&asked.name, out)?;
    }
    let at_move = replica.status.map_or(replica.spec.moves, |status| status.moves.max(replica.spec.moves));
    let wish = json!({ "atMove": at_move, "generation": asked.generation });
    let patch = Patch::Merge(json!({ "spec": { "promote": wish } }));
    api.patch(&asked.name, &PatchParams::default(), &patch).await.map_err(api_error("changing the SyncReplica"))?;
    let followed = Followed {
        what: "the SyncReplica",
        name: &asked.name,
        no_wait: asked.no_wait,
        timeout_seconds: asked.timeout_seconds,
        output: asked.output,
    };
    let observed = |replica: &SyncReplica| replica.status.as_ref().map(|status| status.observed_generation);
    follow(api, &followed, observed, |replica| standing(replica, at_move), out).await
}

fn show(plan: &[(&'static str, String)], output: Output, out: &mut impl Write) -> Result<(), Error> {
    match output {
        Output::Table => {
            for (what, words) in plan {
                writeln!(out, "{what:<5} {words}")?;
            }
        }
        Output::Json => {
            let plan: serde_json::Map<_, _> = plan.iter().map(|(key, value)| ((*key).into(), json!(value))).collect();
            writeln!(out, "{}", json!({ "state": "plan", "words": plan }))?;
        }
    }
    Ok(out.flush()?)
}

/// Only a person at a terminal can agree.
fn confirm(name: &str, out: &mut impl Write) -> Result<(), Error> {
    if !std::io::stdin().is_terminal() {
        return Err(Error::Refused("nobody is here to agree; add --yes".into()));
    }
    write!(out, "Type {name} to go on: ")?;
    out.flush()?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    match line.trim() == name {
        true => Ok(()),
        false => Err(Error::Refused("nothing was done".into())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::Value;

    use super::*;

    fn replica(status: Value) -> SyncReplica {
        serde_json::from_value(json!({
            "apiVersion": "watari.io/v1alpha1", "kind": "SyncReplica", "metadata": { "name": "shop" },
            "spec": {
                "pairId": "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10", "pairName": "apps/shop", "vmName": "shop", "homeSite": "tokyo",
                "site": "osaka", "disks": [], "metadata": { "sizeBytes": 1 << 30, "access": "ReadWriteOnce" },
                "interval": "10s", "retention": { "count": 3 }, "homeAuthorities": "x",
            },
            "status": status,
        }))
        .unwrap()
    }

    fn now() -> Timestamp {
        "2026-11-24T12:00:00Z".parse().unwrap()
    }

    #[test]
    fn what_would_be_lost_is_said_before_anything_is_asked() {
        let whole = |answers: bool| {
            json!({
                "role": "Replica", "committed": "1.42", "committedTime": "2026-11-24T11:59:48Z", "kept": ["1.42", "1.41"], "homeAnswers": answers,
            })
        };
        for (status, generation, words) in [
            (whole(false), None, "lost: everything written in the last 12s, and shortly before"),
            (whole(false), None, "from: 1.42, whole here for 12s"),
            (whole(false), None, "home: tokyo does not answer"),
            (whole(true), None, "lost: nothing, if tokyo goes on answering"),
            (whole(true), None, "home: tokyo answers: `kubectl watari cutover`"),
            (whole(true), Some("1.41"), "lost: everything written after generation 1.41"),
        ] {
            let Prospect::Possible(plan) = prospect(&replica(status), generation, now()) else { panic!("{words}") };
            let text: Vec<String> = plan.iter().map(|(what, said)| format!("{what}: {said}")).collect();
            assert!(text.iter().any(|line| line.starts_with(words)), "{words}: {text:?}");
        }
        for (status, generation, words) in [
            (whole(false), Some("1.40"), "generation 1.40 is not kept here; kept are 1.42, 1.41"),
            (json!({ "role": "Replica" }), None, "no generation is whole here"),
        ] {
            let Prospect::Impossible(why) = prospect(&replica(status), generation, now()) else { panic!("{words}") };
            assert!(why.starts_with(words), "{why}");
        }
        let active = prospect(&replica(json!({ "role": "Serving" })), None, now());
        assert_eq!(active, Prospect::Nothing("VM shop is active here, at osaka, already.".into()));
    }

    #[test]
    fn each_step_of_a_failover_has_its_words_and_another_ones_are_not_taken_for_it() {
        let at = |stage: &str, at_move: i64| {
            json!({ "failover": {
                "atMove": at_move, "stage": stage, "message": "So it is.", "began": "2026-11-24T12:00:00Z",
                "ended": if stage == "Done" { json!("2026-11-24T12:00:31Z") } else { Value::Null },
            } })
        };
        let differs = json!({ "conditions": [{
            "type": "SiteDiffers", "status": "True", "reason": "PromoteDiffers", "message": "an old wish",
            "lastTransitionTime": "2026-11-24T12:00:00Z",
        }] });
        let untouched = Standing::HeldUp("The operator has not taken it up yet.".into());
        for (status, expected) in [
            (at("Refused", 2), Standing::HeldUp("Refused: So it is.".into())),
            (at("Promoting", 2), Standing::UnderWay("Promoting: So it is.".into())),
            (at("Done", 2), Standing::Done("VM shop is active at osaka after 31 s.".into())),
            (at("Done", 0), untouched.clone()),
            (differs, Standing::HeldUp("an old wish".into())),
            (json!({}), untouched),
        ] {
            assert_eq!(standing(&replica(status), 2), expected);
        }
    }
}
