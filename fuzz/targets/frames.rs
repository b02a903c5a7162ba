//! Frames between the runtime and the agent, in both directions: the first byte says which.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sandbox_protocol::{
    FromAgent, Hello, MAX_STREAM_HELLO_BYTES, MAX_TO_GUEST_BYTES, MAX_TO_HOST_BYTES, Request, StreamHello,
    frame,
};

fuzz_target!(|data: &[u8]| {
    let Some((which, mut data)) = data.split_first() else { return };
    match which % 4 {
        0 => while let Ok(Some(_)) = frame::read::<FromAgent>(&mut data, MAX_TO_HOST_BYTES) {},
        1 => while let Ok(Some(_)) = frame::read::<Hello>(&mut data, MAX_TO_HOST_BYTES) {},
        2 => while let Ok(Some(_)) = frame::read::<StreamHello>(&mut data, MAX_STREAM_HELLO_BYTES) {},
        _ => {
            while let Ok(Some(request)) = frame::read::<Request>(&mut data, MAX_TO_GUEST_BYTES) {
                // What was understood can be said again, and means the same.
                let mut again = vec![];
                frame::write(&mut again, &request, MAX_TO_GUEST_BYTES).unwrap();
                let second = frame::read::<Request>(&mut &again[..], MAX_TO_GUEST_BYTES).unwrap().unwrap();
                assert_eq!(request.id, second.id);
            }
        }
    }
});
