//! What sandboxes do, in numbers, in the text format of Prometheus.
//!
//! There is no process that counts. What there is at the moment is read from the state roots and asked of each machine
//! ([`now`]); how starts went is in a file that whoever starts a machine updates ([`starts`]), where the operator has
//! named a directory for it. `docs/metrics.md` has the list.

mod now;
mod starts;
mod text;

pub use starts::Attempt;

use std::path::Path;

use crate::state::StateError;

/// The metrics of a host: of the sandboxes below a state root, and of starts, if they are counted.
pub fn of(root: &Path, starts: Option<&Path>) -> Result<String, StateError> {
    let mut text = text::Text::default();
    for root in now::roots(root)? {
        now::write(&root, &mut text)?;
    }
    if let Some(directory) = starts {
        starts::write(directory, &mut text);
    }
    Ok(text.finish())
}
