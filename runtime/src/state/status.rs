//! The states of a sandbox and the one function that moves between them.
//!
//! ```text
//!             Created           Started            Paused
//!  creating ─────────► created ─────────► running ◄──────► paused
//!     │                   │                  │    Resumed    │
//!     │ Ended             │ Ended            │ Ended         │ Ended
//!     └───────────────────┴────────┬─────────┴───────────────┘
//!                                  ▼
//!                               stopped
//! ```

use serde::{Deserialize, Serialize};

/// What a sandbox is doing, in the words of the OCI runtime specification; `paused` is runc's addition.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The machine boots and the container is being made.
    Creating,
    /// The container stands; its process has not been executed.
    Created,
    /// The process runs.
    Running,
    /// The machine is held.
    Paused,
    /// The process ended, or never ran and never will.
    Stopped,
}

/// What moves a sandbox from one state to the next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Transition {
    /// The agent has made the container.
    Created,
    /// The process executes.
    Started,
    /// The machine was held.
    Paused,
    /// The machine goes on.
    Resumed,
    /// The process ended, the start failed, or the machine went away.
    Ended,
}

/// A transition that a state does not have.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("a sandbox that is {} cannot become {}", .from.name(), .transition.name())]
pub struct Refused {
    from: Status,
    transition: Transition,
}

impl Status {
    /// The state after `transition`.
    pub fn after(self, transition: Transition) -> Result<Self, Refused> {
        match (self, transition) {
            (Self::Creating, Transition::Created) => Ok(Self::Created),
            (Self::Created, Transition::Started) => Ok(Self::Running),
            (Self::Running, Transition::Paused) => Ok(Self::Paused),
            (Self::Paused, Transition::Resumed) => Ok(Self::Running),
            (Self::Creating | Self::Created | Self::Running | Self::Paused, Transition::Ended) => {
                Ok(Self::Stopped)
            }
            (from, transition) => Err(Refused { from, transition }),
        }
    }

    /// The state's name in `state.json` and in lists.
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

impl Transition {
    fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Started => "started",
            Self::Paused => "paused",
            Self::Resumed => "resumed",
            Self::Ended => "stopped",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Status::*;
    use super::*;

    const STATES: [Status; 5] = [Creating, Created, Running, Paused, Stopped];
    const TRANSITIONS: [Transition; 5] = [
        Transition::Created,
        Transition::Started,
        Transition::Paused,
        Transition::Resumed,
        Transition::Ended,
    ];

    #[test]
    fn every_pair_is_as_drawn() {
        // One row per state, one column per transition in the order above.
        let drawn = [
            [Some(Created), None, None, None, Some(Stopped)],
            [None, Some(Running), None, None, Some(Stopped)],
            [None, None, Some(Paused), None, Some(Stopped)],
            [None, None, None, Some(Running), Some(Stopped)],
            [None, None, None, None, None],
        ];
        for (state, row) in STATES.into_iter().zip(drawn) {
            for (transition, expected) in TRANSITIONS.into_iter().zip(row) {
                assert_eq!(state.after(transition).ok(), expected, "{state:?} after {transition:?}");
            }
        }
    }

    #[test]
    fn a_refusal_names_both_ends() {
        let refused = Stopped.after(Transition::Started).unwrap_err();
        assert_eq!(refused.to_string(), "a sandbox that is stopped cannot become started");
    }

    #[test]
    fn names_are_those_of_the_json() {
        for state in STATES {
            assert_eq!(serde_json::to_string(&state).unwrap(), format!("\"{}\"", state.name()));
        }
    }
}
