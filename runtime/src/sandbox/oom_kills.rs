//! Kills for lack of memory in a container, for whoever watches: told as they happen, but not more often than somebody
//! can want to know.
//!
//! The guest says when there was one, and a hostile guest says so without end. Whoever watches hears of the first at
//! once, and then once a [`PAUSE`] at most of all that came in it. What nobody has watched waits for the first who does.

use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::{Duration, Instant};

use super::Answer;

/// How long one who was told is left alone.
const PAUSE: Duration = Duration::from_secs(1);

/// The kills in a container.
#[derive(Debug, Default)]
pub(super) struct OomKills {
    watcher: Option<SyncSender<Answer>>,
    /// Whether there was one that the watcher has not heard of.
    untold: bool,
    /// Until when the watcher is left alone.
    quiet_until: Option<Instant>,
}

impl OomKills {
    /// There was one more.
    pub fn happened(&mut self, now: Instant) {
        self.untold = true;
        self.tell(now);
    }

    /// Somebody watches from now on, in the place of whoever did.
    pub fn watched_by(&mut self, watcher: Option<SyncSender<Answer>>, now: Instant) {
        (self.watcher, self.quiet_until) = (watcher, None);
        self.tell(now);
    }

    /// Tells what is to be told by now.
    pub fn tell(&mut self, now: Instant) {
        let Some(watcher) = &self.watcher else { return };
        if !self.untold || self.quiet_until.is_some_and(|until| now < until) {
            return;
        }
        self.quiet_until = Some(now + PAUSE);
        match watcher.try_send(Answer::OutOfMemory) {
            Ok(()) => self.untold = false,
            // Whoever does not listen is told again later.
            Err(TrySendError::Full(_)) => {}
            Err(TrySendError::Disconnected(_)) => self.watcher = None,
        }
    }

    /// There will be no more: the watcher hears of the last, and that there are no others.
    pub fn end(&mut self, now: Instant) {
        self.quiet_until = None;
        self.tell(now);
        self.watcher = None;
    }

    /// When there is something to tell.
    pub fn deadline(&self) -> Option<Instant> {
        self.quiet_until.filter(|_| self.untold && self.watcher.is_some())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{TryRecvError, sync_channel};

    use super::*;

    #[test]
    fn the_first_kill_is_told_at_once_and_a_flood_of_them_once_a_pause() {
        let (mut kills, start) = (OomKills::default(), Instant::now());
        let (watcher, told) = sync_channel(2);
        kills.watched_by(Some(watcher), start);
        assert_eq!((told.try_recv(), kills.deadline()), (Err(TryRecvError::Empty), None));
        for _ in 0..1000 {
            kills.happened(start);
        }
        assert_eq!(told.try_recv(), Ok(Answer::OutOfMemory));
        assert_eq!(told.try_recv(), Err(TryRecvError::Empty));
        let next = kills.deadline().unwrap();
        assert_eq!(next, start + PAUSE);
        kills.tell(next);
        assert_eq!((told.try_recv(), kills.deadline()), (Ok(Answer::OutOfMemory), None));
        kills.tell(next + PAUSE);
        kills.happened(next + PAUSE);
        kills.happened(next + PAUSE);
        kills.end(next + PAUSE);
        assert_eq!(told.iter().collect::<Vec<_>>(), [Answer::OutOfMemory, Answer::OutOfMemory]);
    }

    #[test]
    fn what_nobody_watched_waits_and_whoever_does_not_listen_is_not_waited_for() {
        let (mut kills, now) = (OomKills::default(), Instant::now());
        kills.happened(now);
        assert_eq!(kills.deadline(), None);
        let (watcher, told) = sync_channel(1);
        kills.watched_by(Some(watcher), now);
        kills.happened(now + PAUSE);
        // There is no room for the second, and the next try is later.
        assert_eq!(kills.deadline(), Some(now + 2 * PAUSE));
        assert_eq!(told.try_recv(), Ok(Answer::OutOfMemory));
        kills.tell(now + 2 * PAUSE);
        assert_eq!((told.try_recv(), kills.deadline()), (Ok(Answer::OutOfMemory), None));
        drop(told);
        kills.happened(now + 3 * PAUSE);
        assert_eq!(kills.deadline(), None);
    }
}
