//! The agent in the guest, as the host meets it: a peer that may lie.
//!
//! Only the guest dials. What arrives is read with the bounds of the protocol and becomes events; whatever is
//! against the protocol ends the connection, and with it the sandbox.

mod calls;
mod control;
mod door;

pub use calls::{Calls, CallsError};
pub use control::listen_for_agent;
pub use door::{Secret, listen_for_streams};
