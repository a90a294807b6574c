//! What is measured, and what it is compared with.

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Variant {
    /// Plain Envoy forwards one request.
    Plain,
    /// Plain Envoy forwards two requests, one after the other: the floor of two legs.
    PlainTwice,
    /// Envoy with the filter, one leg.
    OneLeg,
    /// Envoy with the filter, two legs.
    TwoLegs,
    /// The other build of the filter, one leg.
    OneLegBeside,
    /// The other build of the filter, two legs.
    TwoLegsBeside,
    /// The least that runs two legs.
    Least,
}

impl Variant {
    /// All of them, in the order in which a round measures them.
    pub const ALL: [Self; 7] = [
        Self::Plain,
        Self::PlainTwice,
        Self::OneLeg,
        Self::TwoLegs,
        Self::OneLegBeside,
        Self::TwoLegsBeside,
        Self::Least,
    ];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::PlainTwice => "plain, twice",
            Self::OneLeg => "filter, one leg",
            Self::TwoLegs => "filter, two legs",
            Self::OneLegBeside => "other, one leg",
            Self::TwoLegsBeside => "other, two legs",
            Self::Least => "least, two legs",
        }
    }

    /// What it is compared with.
    pub fn floor(self) -> Self {
        match self {
            Self::Plain | Self::OneLeg | Self::OneLegBeside => Self::Plain,
            Self::PlainTwice | Self::TwoLegs | Self::TwoLegsBeside | Self::Least => Self::PlainTwice,
        }
    }

    /// Most CPU microseconds above the floor that the project aims at.
    pub fn target_us(self, size: usize) -> Option<f64> {
        (matches!(self, Self::OneLeg | Self::TwoLegs) && size == 4_000).then_some(60.0)
    }

    /// Largest ratio to the floor that the project aims at.
    pub fn target(self, size: usize) -> Option<f64> {
        match self {
            Self::TwoLegs if size <= 1_000 => Some(1.2),
            Self::TwoLegs if size <= 16_000 => Some(1.3),
            Self::TwoLegs => Some(1.4),
            _ => None,
        }
    }
}
