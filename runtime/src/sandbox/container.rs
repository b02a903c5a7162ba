//! A container of a sandbox: what it is, what it is doing, and who wants to know.
//!
//! ```text
//!  Preparing ──► Making ──► Showing ──► Standing ──► Starting ──► Running
//!      │            │          │           │            │           │
//!      │            └──────────┴───────────┴──┬─────────┴───────────┘  its process has ended
//!      │                           ┌──────────┘
//!      │                           ▼
//!      │                       Draining ──► Settling ──► Leaving ──► (gone)
//!      └────────────── it was not to be ───────────────────▲
//! ```
//!
//! `Preparing` is the host's part: its files and hooks. `Showing` is for hooks that are to see its files, where there
//! are any. `Draining` waits for the output of its first process, and for the hooks that its start has brought about;
//! `Settling` for the processes that were added. A sandbox ends when its first container has settled; another
//! container leaves: the guest forgets it, and its files are taken away.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use sandbox_vmm_api::ShareEntry;

use super::execs::Execs;
use super::oom_kills::OomKills;
use super::plan::ContainerPlan;
use super::streams::{Ends, Streams};
use super::{Answer, Error, Exit, Sender};
use crate::block::Given;
use crate::listening::Listening;
use crate::state::{Record, SandboxId, StateDir, Status, Transition};

/// What is said of a container whose record says already that it runs.
pub(super) const STARTING: &str = "container not running: it is being started";

/// The number of a container, never used twice: events that are late cannot be taken for those of a successor of
/// the same name.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Serial(u64);

impl Serial {
    /// One that nobody has.
    pub fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// A container that wants to join a sandbox. Its directory is claimed, and requests are listened for.
#[derive(Debug)]
pub struct Newcomer {
    /// What it is to be.
    pub place: Claimed,
    /// Where its streams go.
    pub ends: Ends,
    /// What its machine is to share besides.
    pub shares: Vec<ShareEntry>,
    /// Who is told how it goes: [`Answer::Done`] when it stands, and then [`Answer::Exited`]; or
    /// [`Answer::Refused`].
    pub owner: SyncSender<Answer>,
}

/// A container that has a directory and a socket on the host.
#[derive(Debug)]
pub struct Claimed {
    /// Its number.
    pub serial: Serial,
    /// What it is to be.
    pub plan: ContainerPlan,
    /// Where it can be asked.
    pub listening: Listening,
    // Last, so that the directory is removed after its socket.
    /// Its directory.
    pub directory: StateDir,
}

/// Where a container stands.
#[derive(Debug)]
pub enum Stage {
    /// The host prepares it.
    Preparing,
    /// The agent makes it.
    Making,
    /// The agent has made it, and hooks of the host are shown its files.
    Showing,
    /// Its process waits to be started.
    Standing,
    /// The agent starts it; somebody may wait for that.
    Starting(Option<SyncSender<Answer>>),
    /// Its process runs.
    Running,
    /// Its process has ended. When its output moved last, and how far it was.
    Draining(Instant, Option<u64>),
    /// Its output has been delivered. How long the rest may take.
    Settling(Instant),
    /// It is being taken away.
    Leaving,
}

impl Stage {
    /// Whether its process has not executed its program yet.
    pub(super) fn comes_before_running(&self) -> bool {
        matches!(self, Self::Preparing | Self::Making | Self::Showing | Self::Standing | Self::Starting(_))
    }
}

/// A container.
#[derive(Debug)]
pub struct Container {
    pub(super) serial: Serial,
    pub(super) plan: ContainerPlan,
    pub(super) record: Record,
    pub(super) stage: Stage,
    pub(super) streams: Streams,
    pub(super) execs: Execs,
    pub(super) exit: Option<Exit>,
    pub(super) oom_kills: OomKills,
    /// What its machine shares for it alone.
    pub(super) shares: Vec<ShareEntry>,
    /// The block devices that its machine has for it.
    pub(super) blocks: Vec<Given>,
    /// Whether whoever made it is gone, so that it must not come to stand.
    pub(super) unwanted: bool,
    /// Whether hooks that come after its start are running, and its end comes after theirs.
    pub(super) hooks_awaited: bool,
    /// Who has started it and waits for them.
    pub(super) starter: Option<SyncSender<Answer>>,
    /// What the agent is doing for it, and until when it has to be done.
    pub(super) due: Option<(Instant, &'static str)>,
    /// When it has to have ended, having been killed.
    pub(super) cut: Option<Instant>,
    /// Whether its output has been given up, for its process to end.
    pub(super) abandoned: bool,
    /// What its owner is told in the end.
    pub(super) last_word: Option<Answer>,
    _listening: Listening,
    // After the socket that is in it.
    pub(super) directory: StateDir,
    /// Who made it, where that is not the sandbox's client. Last, so that whoever hears that the line is cut finds
    /// nobody in the directory.
    pub(super) owner: Option<SyncSender<Answer>>,
}

impl Container {
    /// Writes the record of a container to be.
    pub fn new(
        claimed: Claimed,
        ends: Ends,
        sandbox: Option<SandboxId>,
        sender: Sender,
    ) -> Result<Self, Error> {
        let Claimed { serial, mut plan, listening, directory } = claimed;
        let record = plan.record(sandbox);
        directory.write(&record)?;
        let streams = Streams::expect(serial, "", plan.has_terminal(), ends, sender);
        plan.create.streams = streams.wanted();
        Ok(Self {
            serial,
            plan,
            record,
            stage: Stage::Preparing,
            streams,
            execs: Execs::default(),
            exit: None,
            oom_kills: OomKills::default(),
            shares: Vec::new(),
            blocks: Vec::new(),
            unwanted: false,
            hooks_awaited: false,
            starter: None,
            due: None,
            cut: None,
            abandoned: false,
            last_word: None,
            _listening: listening,
            directory,
            owner: None,
        })
    }

    /// Its name in the guest.
    pub(super) fn name(&self) -> &str {
        &self.plan.create.container
    }

    /// Moves to the next state and records it.
    pub(super) fn become_(&mut self, transition: Transition) -> Result<(), Error> {
        self.record.status = self.record.status.after(transition)?;
        if self.plan.detached && self.record.status == Status::Created && !self.unwanted {
            self.record.kept = true;
            self.directory.keep();
        }
        match self.directory.write(&self.record) {
            // The disk may be full; that nobody holds the directory any more says the same.
            Err(_) if self.record.status == Status::Stopped => Ok(()),
            written => Ok(written?),
        }
    }

    /// Records that it has stopped, and how.
    pub(super) fn stop(&mut self) -> Result<(), Error> {
        self.record.out_of_memory = self.exit.is_some_and(|exit| exit.out_of_memory);
        self.become_(Transition::Ended)
    }

    /// Tells whoever made it, if that is not the sandbox's client.
    pub(super) fn tell(&self, word: Answer) {
        if let Some(owner) = &self.owner {
            let _ = owner.try_send(word);
        }
    }

    /// Whether the agent may know it.
    pub(super) fn is_in_guest(&self) -> bool {
        !matches!(self.stage, Stage::Preparing)
    }

    /// The streams of a process by its name; empty: the container's first.
    pub(super) fn streams_of(&mut self, process: &str) -> Option<&mut Streams> {
        match process {
            "" => Some(&mut self.streams),
            process => self.execs.streams(process),
        }
    }

    /// Why nothing can be asked of its processes now.
    pub(super) fn not_running(&self) -> Option<Answer> {
        match self.record.status {
            Status::Running if matches!(self.stage, Stage::Starting(_)) => Some(Answer::refused(STARTING)),
            Status::Running if self.exit.is_none() => None,
            Status::Running => Some(Answer::refused("container not running: its process has ended")),
            status => Some(Answer::refused(format!("container not running: it is {}", status.name()))),
        }
    }

    /// When it has to be looked at again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let settling = match self.stage {
            Stage::Settling(until) => Some(until),
            _ => None,
        };
        let due = self.due.map(|(until, _)| until);
        [due, self.cut, settling, self.oom_kills.deadline()].into_iter().flatten().min()
    }
}
