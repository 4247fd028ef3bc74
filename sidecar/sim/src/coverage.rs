//! What a run has reached: transitions, messages, crash points, outcomes. Printed as a table; what had to be reached and
//! was not is a failure of the simulator.

use std::collections::BTreeMap;

/// Counts by name.
#[derive(Clone, Debug, Default)]
pub struct Coverage(pub BTreeMap<String, u64>);

impl Coverage {
    pub fn hit(&mut self, what: impl AsRef<str>) {
        match self.0.get_mut(what.as_ref()) {
            Some(n) => *n += 1,
            None => {
                self.0.insert(what.as_ref().to_owned(), 1);
            }
        }
    }

    pub fn add(&mut self, other: &Coverage) {
        for (what, n) in &other.0 {
            *self.0.entry(what.clone()).or_default() += n;
        }
    }

    pub fn get(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }

    /// Names of `wanted` that were never reached.
    pub fn missing<'a>(&self, wanted: &[&'a str]) -> Vec<&'a str> {
        wanted.iter().copied().filter(|w| self.get(w) == 0).collect()
    }

    pub fn table(&self) -> String {
        let width = self.0.keys().map(String::len).max().unwrap_or(0);
        self.0.iter().map(|(what, n)| format!("{what:width$}  {n}\n")).collect()
    }
}
