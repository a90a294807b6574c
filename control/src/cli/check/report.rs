//! What a check has found.

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// One line for each file that is good, and what could not be checked.
    pub said: Vec<String>,
    /// One line for each thing that would be taken and could not serve.
    pub warnings: Vec<String>,
    /// One line for each thing that would be refused or would not work.
    pub faults: Vec<String>,
}

impl Report {
    /// Adds a line for what could not be checked, once.
    pub fn note(&mut self, what: String) {
        if !self.said.contains(&what) {
            self.said.push(what);
        }
    }

    /// Adds a line for what is wrong, once.
    pub fn fault(&mut self, what: String) {
        if !self.faults.contains(&what) {
            self.faults.push(what);
        }
    }

    /// Adds a line for what would be taken and cannot serve, once.
    pub fn warn(&mut self, what: String) {
        if !self.warnings.contains(&what) {
            self.warnings.push(what);
        }
    }
}
