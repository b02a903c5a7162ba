//! Flow control: how much may be under way in each direction.
//!
//! Each side tells the other, in every packet, how large its receive buffer for the connection is
//! (`buf_alloc`) and how many bytes it has taken out of that buffer since the connection began (`fwd_cnt`, a
//! counter modulo 2^32). A sender with `sent` bytes behind it may send `buf_alloc - (sent - fwd_cnt)` more. So
//! a reader that stops reading stops the writer at the other end, and no side ever holds more than it offered.

/// The receive buffer that each connection offers to the guest.
pub const BUFFER_BYTES: u32 = 256 * 1024;

/// The guest sent more than it was offered.
#[derive(Debug, PartialEq, Eq)]
pub struct Overrun;

/// Our side as the receiver of the guest's data.
#[derive(Debug, Default)]
pub struct ReceiveWindow {
    received: u32,
    forwarded: u32,
    announced: u32,
}

impl ReceiveWindow {
    /// The guest sent so many bytes.
    pub fn receive(&mut self, bytes: u32) -> Result<(), Overrun> {
        let held = self.received.wrapping_sub(self.forwarded);
        if BUFFER_BYTES.saturating_sub(held) < bytes {
            return Err(Overrun);
        }
        self.received = self.received.wrapping_add(bytes);
        Ok(())
    }

    /// So many bytes have left for the host.
    pub fn forward(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// Whether the guest should be told now, without waiting for a packet that goes to it anyway: something
    /// has been taken out, and as far as it knows less than half of the buffer is free.
    pub fn update_due(&self) -> bool {
        let held_as_told = self.received.wrapping_sub(self.announced);
        self.forwarded != self.announced && held_as_told > BUFFER_BYTES / 2
    }

    /// The `fwd_cnt` for a packet that is being sent.
    pub fn announce(&mut self) -> u32 {
        self.announced = self.forwarded;
        self.forwarded
    }
}

/// Our side as the sender of the host's data.
#[derive(Debug, Default)]
pub struct SendWindow {
    sent: u32,
    peer_buffer: u32,
    peer_forwarded: u32,
}

impl SendWindow {
    /// What the guest's last packet said of its buffer.
    pub fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_buffer = buf_alloc;
        self.peer_forwarded = fwd_cnt;
    }

    /// How many bytes may be sent.
    pub fn available(&self) -> u32 {
        self.peer_buffer.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// So many bytes have been sent.
    pub fn send(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_cannot_overrun_the_buffer_even_across_the_wrap() {
        let mut window =
            ReceiveWindow { received: u32::MAX - 10, forwarded: u32::MAX - 10, announced: u32::MAX - 10 };
        window.receive(BUFFER_BYTES).unwrap();
        assert_eq!(window.receive(1), Err(Overrun));
        window.forward(5);
        window.receive(5).unwrap();
        assert_eq!(window.receive(1), Err(Overrun));
        assert_eq!(window.announce(), (u32::MAX - 10).wrapping_add(5));
    }

    #[test]
    fn an_update_is_due_when_the_guest_believes_the_buffer_half_full() {
        let mut window = ReceiveWindow::default();
        window.receive(BUFFER_BYTES / 2).unwrap();
        window.forward(BUFFER_BYTES / 2);
        assert!(!window.update_due());
        window.receive(1).unwrap();
        assert!(window.update_due());
        window.announce();
        assert!(!window.update_due());
    }

    /// Whatever is sent and forwarded in whatever order, a guest that stops at what it believes its credit to be
    /// is never refused, and is never left without credit and without an update due.
    #[test]
    fn an_obedient_guest_neither_overruns_nor_starves() {
        let mut random = 1u32;
        let mut next = |below: u32| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (random >> 8) % below.max(1)
        };
        let mut window = ReceiveWindow::default();
        let (mut sent, mut told) = (0u32, 0u32);
        for _ in 0..100_000 {
            let credit = BUFFER_BYTES - sent.wrapping_sub(told);
            let bytes = next(credit + 1);
            window.receive(bytes).unwrap();
            sent = sent.wrapping_add(bytes);
            let held = window.received.wrapping_sub(window.forwarded);
            window.forward(next(held + 1));
            if window.update_due() {
                told = window.announce();
            }
            let credit = BUFFER_BYTES - sent.wrapping_sub(told);
            let held = window.received.wrapping_sub(window.forwarded);
            assert!(credit > 0 || held > 0, "nothing is held, and yet the guest may not send");
        }
    }

    #[test]
    fn a_peer_that_claims_to_have_forwarded_what_was_never_sent_gets_nothing() {
        let mut window = SendWindow::default();
        window.update(1000, 0);
        window.send(600);
        assert_eq!(window.available(), 400);
        window.update(1000, 601);
        assert_eq!(window.available(), 0);
        window.update(500, 0);
        assert_eq!(window.available(), 0);
        window.update(1000, 600);
        assert_eq!(window.available(), 1000);
    }
}
