//! An agent that lies: whoever owns the guest's kernel speaks in its place, to the runtime on the host.

use sandbox_tests::{Outcome, initramfs, sandbox};

/// The exit code of an error of the runtime's.
const ERROR: i32 = 125;

/// Runs a sandbox whose agent lies in one way; it has to end with an error that says so, and to leave nothing.
#[track_caller]
fn lies(how: &str, words: &[&str]) -> Outcome {
    let image = tempfile::NamedTempFile::new().unwrap();
    initramfs::write(image.path(), Some(&format!("lie,{how}"))).unwrap();
    let sandbox = sandbox(&format!("liar-{how}")).host_env("SANDBOX_IMAGE", image.path());
    let outcome = sandbox.run(["true"]).expect_error(ERROR, words);
    sandbox.expect_nothing_left();
    outcome
}

#[test]
fn a_frame_that_is_too_large_is_not_read() {
    lies("giant", &["over the limit"]);
}

#[test]
fn half_a_frame_is_no_frame() {
    lies("half", &["in the middle of a message"]);
}

#[test]
fn a_frame_that_is_no_message_ends_the_sandbox() {
    lies("nonsense", &["a frame is not what was expected"]);
}

#[test]
fn a_reply_that_nobody_asked_for_ends_the_sandbox() {
    lies("unasked", &["request 4711, which was never made"]);
}

#[test]
fn a_hello_comes_once_on_the_one_connection_for_control() {
    lies("hello-again", &["a frame is not what was expected"]);
}

#[test]
fn a_reply_that_comes_twice_ends_the_sandbox() {
    lies("reply-again", &["request 1, ", "is answered already"]);
}

#[test]
fn a_stream_that_is_claimed_again_stays_what_it_was() {
    let outcome = lies("stream-again", &["streams that nobody expects"]);
    assert_eq!(outcome.out(), "first\n", "{outcome}");
}

#[test]
fn a_flood_of_events_of_nobody_ends_the_sandbox() {
    lies("nobody", &["a process that does not exist"]);
}

#[test]
fn a_flood_of_streams_that_nobody_expects_ends_the_sandbox() {
    lies("streams", &["streams that nobody expects"]);
}
