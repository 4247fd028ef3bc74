//! The exhaustive model of epochs, handover, abort, failover and return ([`watari_sim::rights`]), by stateright.
//! State counts are printed; the bounds are the ones below. `RIGHTS=full` visits the wide ones, as `make soak` does.

#![allow(clippy::unwrap_used)]

use std::{
    collections::{HashMap, HashSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
    time::Instant,
};

use stateright::{Checker, Model, Property};
use watari_core::{
    handover::{Action, Event, Gate, Message},
    record::Role,
};
use watari_sim::rights::{Bounds, Move, State};

struct Rights(Bounds);

const MOVE: &str = "a move";
const BACK: &str = "a move there and one back";
const FAILOVER: &str = "a failover and the return of the other side";

fn active(s: &State) -> usize {
    usize::from(s.sides[1].durable.role == Role::Serving)
}

impl Model for Rights {
    type State = State;
    type Action = Move;

    fn init_states(&self) -> Vec<State> {
        vec![State::default()]
    }
    fn actions(&self, state: &State, actions: &mut Vec<Move>) {
        if state.bad.is_none() {
            state.moves(&self.0, actions);
        }
    }
    fn next_state(&self, last: &State, action: Move) -> Option<State> {
        last.after(action, &self.0)
    }
    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing that must not happen", |_, s: &State| s.bad.is_none()),
            Property::sometimes(MOVE, |_, s: &State| s.settled() && active(s) == 1 && s.used[2] + s.used[3] == 0),
            // Site 0 begins from a generation that site 1 cut.
            Property::sometimes(BACK, |_, s: &State| {
                s.settled() && active(s) == 0 && s.used[2] + s.used[3] == 0 && s.sides[0].durable.base.epoch == 2
            }),
            Property::sometimes(FAILOVER, |_, s: &State| s.settled() && active(s) == 1 && s.used[2] > 0),
        ]
    }
}

fn full() -> bool {
    std::env::var("RIGHTS").is_ok_and(|value| value == "full")
}

fn check(what: &str, bounds: Bounds, reached: &[&'static str]) {
    let began = Instant::now();
    // Depth first keeps fewer states at a time, breadth first finds the shortest way to what is wrong.
    let builder = Rights(bounds).checker().threads(2);
    if full() {
        told(what, bounds, reached, began, &builder.spawn_dfs().join())
    } else {
        told(what, bounds, reached, began, &builder.spawn_bfs().join())
    }
}

fn told(what: &str, bounds: Bounds, reached: &[&'static str], began: Instant, checker: &impl Checker<Rights>) {
    let (states, seconds) = (checker.unique_state_count(), began.elapsed().as_secs_f64());
    println!("{what}: {states} states, depth {}, {seconds:.0} s, {bounds:?}", checker.max_depth());
    if let Some(path) = checker.discovery("nothing that must not happen") {
        let (state, actions) = (path.last_state().clone(), path.into_actions());
        panic!("{what}: {:?} after {actions:?}\n{state:#?}", state.bad);
    }
    for wanted in reached {
        assert!(checker.discovery(wanted).is_some(), "{what}: {wanted} was never reached, so the model proves nothing");
    }
}

#[test]
fn moves_and_aborts_with_crashes_lose_nothing_and_never_have_two_writers() {
    let bounds = Bounds { writes: 2, handovers: 2, promotions: 0, reclaims: 0, crashes: 1, messages: 1 };
    let bounds = if full() { Bounds { crashes: 2, messages: 2, ..bounds } } else { bounds };
    check("moves", bounds, &[MOVE, BACK]);
}

#[test]
fn a_failover_during_a_move_is_told_from_the_move() {
    let bounds = Bounds { writes: 1, handovers: 1, promotions: 1, reclaims: 0, crashes: 1, messages: 1 };
    let bounds = if full() { Bounds { writes: 2, handovers: 2, crashes: 2, messages: 2, ..bounds } } else { bounds };
    check("failover", bounds, &[MOVE, FAILOVER]);
}

#[test]
fn a_source_that_a_person_tells_to_serve_on_wins_over_the_move() {
    let bounds = Bounds { writes: 2, handovers: 1, promotions: 0, reclaims: 1, crashes: 1, messages: 1 };
    let bounds = if full() { Bounds { handovers: 2, messages: 2, ..bounds } } else { bounds };
    check("reclaim", bounds, &[MOVE]);
}

fn fingerprint(state: &State) -> u64 {
    let mut hasher = DefaultHasher::new();
    state.hash(&mut hasher);
    hasher.finish()
}

/// Every state, each once, in the order of its distance; `see` hears of each state and of each move to another.
fn visit(bounds: &Bounds, mut see: impl FnMut(u32, &State), mut led: impl FnMut(u32, Move, u32)) {
    let mut index: HashMap<u64, u32> = HashMap::from([(fingerprint(&State::default()), 0)]);
    let mut todo = VecDeque::from([(0, State::default())]);
    let mut moves = Vec::new();
    while let Some((here, state)) = todo.pop_front() {
        see(here, &state);
        moves.clear();
        state.moves(bounds, &mut moves);
        for made in &moves {
            let Some(next) = state.after(*made, bounds) else { continue };
            let new = index.len() as u32;
            let there = *index.entry(fingerprint(&next)).or_insert(new);
            if there == new {
                todo.push_back((there, next));
            }
            led(here, *made, there);
        }
    }
}

#[test]
fn from_every_state_duty_alone_leads_to_one_side_that_serves_and_one_that_receives() {
    let bounds = Bounds { writes: 0, handovers: 1, promotions: 1, reclaims: 0, crashes: 1, messages: 1 };
    let bounds = if full() { Bounds { writes: 1, handovers: 2, reclaims: 1, ..bounds } } else { bounds };
    let began = Instant::now();
    // Who leads to whom by duty: deliveries, contacts, restarts, and what operators and people owe.
    let (mut states, mut good, mut edges) = (0, Vec::new(), Vec::new());
    visit(
        &bounds,
        |here, state| {
            states = here as usize + 1;
            if state.settled() {
                good.push(here);
            }
        },
        |here, made, there| {
            if made.is_duty() {
                edges.push((there, here));
            }
        },
    );
    edges.sort_unstable();
    let from =
        |there: u32| edges[edges.partition_point(|(t, _)| *t < there)..].iter().take_while(move |(t, _)| *t == there);
    let mut reaches = vec![false; states];
    let mut queue = good;
    while let Some(at) = queue.pop() {
        if !std::mem::replace(&mut reaches[at as usize], true) {
            queue.extend(from(at).map(|(_, here)| *here));
        }
    }
    let stuck: HashSet<u32> = (0..states as u32).filter(|i| !reaches[*i as usize]).collect();
    println!(
        "liveness: {states} states, {} of them stuck, {:.0} s, {bounds:?}",
        stuck.len(),
        began.elapsed().as_secs_f64()
    );
    if let Some(first) = stuck.iter().min() {
        visit(&bounds, |here, state| assert!(here != *first, "duty leads nowhere: {state:#?}"), |_, _, _| {});
    }
}

#[test]
fn what_attaches_and_leaves_says_nothing_of_rights() {
    let bounds = Bounds { writes: 0, handovers: 1, promotions: 1, reclaims: 1, crashes: 0, messages: 1 };
    let words = [
        |handover| Message::Attached { handover },
        |handover| Message::QemuLeft { handover },
        |handover| Message::Released { handover },
    ];
    let mut seen = 0;
    let see = |_: u32, state: &State| {
        for life in state.sides.iter().filter_map(|side| side.life.as_ref()) {
            let heard = words.iter().map(|word| Event::Received(word([1; 16]), Default::default()));
            for event in heard.chain([Event::GuestAttached, Event::GuestLeft]) {
                let mut site = life.site.clone();
                let record = site.record().clone();
                for action in site.apply(event.clone()) {
                    let harmless = match &action {
                        Action::Converge(_) => true,
                        Action::Gate(gate) => *gate == Gate::Remote && record.role == Role::Replica,
                        Action::Send(Message::Attached { .. } | Message::QemuLeft { .. }) => true,
                        _ => false,
                    };
                    assert!(harmless, "{event:?} in {record:?} leads to {action:?}");
                    seen += 1;
                }
                assert_eq!(site.record(), &record, "{event:?} changes the record");
            }
        }
    };
    visit(&bounds, see, |_, _, _| {});
    assert!(seen > 1000, "{seen} actions");
}
