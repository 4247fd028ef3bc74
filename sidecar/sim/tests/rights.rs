//! The exhaustive model of epochs, handover, abort, failover and return ([`watari_sim::rights`]), by stateright.
//! State counts are printed; the bounds are the ones below.

use std::collections::{HashMap, VecDeque};

use stateright::{Checker, Model, Property};
use watari_core::record::Role;
use watari_sim::rights::{Bounds, Move, State};

struct Rights(Bounds);

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
            Property::sometimes("a move", |_, s: &State| {
                s.settled() && s.sides[1].durable.role == Role::Serving && s.used[2] + s.used[3] == 0
            }),
            Property::sometimes("a failover and the return of the other side", |_, s: &State| {
                s.settled() && s.sides[1].durable.role == Role::Serving && s.used[2] > 0
            }),
        ]
    }
}

fn check(what: &str, bounds: Bounds, reached: &[&'static str]) -> usize {
    let checker = Rights(bounds).checker().threads(2).spawn_bfs().join();
    let states = checker.unique_state_count();
    println!("{what}: {states} states, depth {}, {bounds:?}", checker.max_depth());
    if let Some(path) = checker.discovery("nothing that must not happen") {
        let (state, actions) = (path.last_state().clone(), path.into_actions());
        panic!("{what}: {:?} after {actions:?}\n{state:#?}", state.bad);
    }
    for wanted in reached {
        assert!(checker.discovery(wanted).is_some(), "{what}: {wanted} was never reached, so the model proves nothing");
    }
    states
}

#[test]
fn moves_and_aborts_with_crashes_lose_nothing_and_never_have_two_writers() {
    let bounds = Bounds { writes: 1, handovers: 1, promotions: 0, reclaims: 0, crashes: 2, messages: 1 };
    assert!(check("moves", bounds, &["a move"]) > 1000);
}

#[test]
fn a_failover_during_a_move_is_told_from_the_move() {
    let bounds = Bounds { writes: 1, handovers: 1, promotions: 1, reclaims: 0, crashes: 0, messages: 1 };
    assert!(check("failover", bounds, &["a move", "a failover and the return of the other side"]) > 1000);
}

#[test]
fn from_every_state_duty_alone_leads_to_one_side_that_serves_and_one_that_receives() {
    let bounds = Bounds { writes: 0, handovers: 1, promotions: 0, reclaims: 0, crashes: 1, messages: 1 };
    // All states and who leads to whom by duty: deliveries, contacts, restarts, and what operators owe.
    let mut index: HashMap<State, usize> = HashMap::new();
    let mut back: Vec<Vec<usize>> = Vec::new();
    let mut good = Vec::new();
    let mut todo = VecDeque::from([State::default()]);
    index.insert(State::default(), 0);
    back.push(Vec::new());
    let mut moves = Vec::new();
    while let Some(state) = todo.pop_front() {
        let here = index[&state];
        if state.settled() {
            good.push(here);
        }
        moves.clear();
        state.moves(&bounds, &mut moves);
        for made in &moves {
            let Some(next) = state.after(*made, &bounds) else { continue };
            let there = *index.entry(next.clone()).or_insert_with(|| {
                back.push(Vec::new());
                todo.push_back(next);
                back.len() - 1
            });
            if made.is_duty() {
                back[there].push(here);
            }
        }
    }
    let mut reaches = vec![false; back.len()];
    let mut queue = good;
    while let Some(at) = queue.pop() {
        if !std::mem::replace(&mut reaches[at], true) {
            queue.extend(&back[at]);
        }
    }
    let stuck: Vec<usize> = (0..back.len()).filter(|i| !reaches[*i]).collect();
    println!("liveness: {} states, {} of them stuck, {bounds:?}", back.len(), stuck.len());
    if let Some(first) = stuck.first() {
        let state = index.iter().find(|(_, i)| *i == first).map(|(s, _)| s);
        panic!("{} states lead nowhere, the first: {state:#?}", stuck.len());
    }
}
