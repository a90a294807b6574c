//! The report of a check.

/// The findings of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// One line for each valid file, and for each thing that could not be checked.
    pub said: Vec<String>,
    /// One line for each valid list, or part of one, that cannot serve.
    pub warnings: Vec<String>,
    /// One line for each fault: an object that would be refused, or a setting that does not work.
    pub faults: Vec<String>,
}

impl Report {
    /// Adds a line for a thing that could not be checked, once.
    pub fn note(&mut self, what: String) {
        if !self.said.contains(&what) {
            self.said.push(what);
        }
    }

    /// Adds a line for a fault, once.
    pub fn fault(&mut self, what: String) {
        if !self.faults.contains(&what) {
            self.faults.push(what);
        }
    }

    /// Adds a line for a list that cannot serve, once.
    pub fn warn(&mut self, what: String) {
        if !self.warnings.contains(&what) {
            self.warnings.push(what);
        }
    }
}
