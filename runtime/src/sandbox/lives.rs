//! What the containers of a sandbox go through: see the picture in [`super::container`].
//!
//! An error that one of them meets is its own end: of the first container, that is the end of the sandbox. What
//! concerns the machine or the agent as such is the end of the sandbox, whoever met it.

use std::time::{Duration, Instant};

use sandbox_protocol::{Call, Outcome};
use sandbox_vmm_api::ShareEntry;

use super::booted::reply;
use super::container::{Container, Newcomer, Serial, Stage};
use super::event::Work;
use super::ready::{Asked, Ready, STOP_TIME};
use super::{Answer, Ending, Error, Event, Exit};
use crate::block::{self, Given};
use crate::state::{Status, Transition};
use crate::view::View;
use crate::{engine, exit, hooks, share, thread};

/// How long the output of a process that ended may stand still.
const DRAIN_TIME: Duration = Duration::from_secs(10);

/// How long added processes may take to be gone after the container's own.
const SETTLE_TIME: Duration = Duration::from_secs(2);

/// The most containers of a sandbox, as many as its agent takes.
const MAX_CONTAINERS: usize = 256;

const KILL: u8 = rustix::process::Signal::KILL.as_raw() as u8;

const MAKE: &str = "make the container";
const START: &str = "start the process";
const FORGET: &str = "forget a container that has ended";

/// A container whose first process has ended and whose output has been delivered.
enum Settled {
    Yes,
    NotYet,
}

impl Ready<'_> {
    /// Takes one more container into the sandbox.
    pub(super) fn join(&mut self, newcomer: Newcomer) -> Result<(), Error> {
        let Newcomer { place, ends, shares, owner } = newcomer;
        let refused = self.has_no_room(&place.plan.create.container).or_else(|| self.cannot_share(&shares));
        if let Some(why) = refused {
            drop(place);
            let _ = owner.try_send(Answer::refused(why));
            return Ok(());
        }
        let (serial, sandbox) = (place.serial, self.first().plan.id.clone());
        match Container::new(place, ends, Some(sandbox), self.inbox.sender()) {
            Ok(mut container) => {
                container.record.machine = self.first().record.machine;
                container.record.machine_pid = self.first().record.machine_pid;
                container.owner = Some(owner);
                container.shares = shares;
                self.containers.insert(serial, container);
                self.prepare(serial)
            }
            Err(error) => {
                let _ = owner.try_send(Answer::refused(error.to_string()));
                Ok(())
            }
        }
    }

    /// Why no container can join.
    fn has_no_room(&self, name: &str) -> Option<String> {
        let first = self.first();
        let sandbox = &first.plan.id;
        match first.record.status {
            Status::Created | Status::Running | Status::Paused if first.exit.is_none() => {}
            status => {
                return Some(format!("the sandbox `{sandbox}` that it is to join is {}", status.name()));
            }
        }
        if self.containers.len() >= MAX_CONTAINERS {
            return Some(format!(
                "the sandbox `{sandbox}` has {MAX_CONTAINERS} containers, which is the limit"
            ));
        }
        let taken = self.containers.values().any(|container| container.name() == name);
        taken.then(|| format!("the sandbox `{sandbox}` has a container `{name}` already"))
    }

    /// Why what a container shares cannot be had.
    fn cannot_share(&self, shares: &[ShareEntry]) -> Option<String> {
        let writes = shares.iter().any(|share| !share.read_only);
        (writes && !self.plan.config.writable_later).then(|| {
            let sandbox = &self.first().plan.id;
            format!(
                "the sandbox `{sandbox}` that it is to join runs in the foreground, where what joins can change no \
                 files of the host: start the sandbox with --detach, or share files read-only"
            )
        })
    }

    /// Has the host do its part for a container: its files, and the hooks that come before it.
    pub(super) fn prepare(&mut self, serial: Serial) -> Result<(), Error> {
        let Some(container) = self.containers.get(&serial) else { return Ok(()) };
        let (shares, hooks) = (container.shares.clone(), container.plan.hooks.clone());
        let blocks = container.plan.blocks.clone();
        if shares.is_empty() && blocks.is_empty() && !hooks.come_before() {
            return self.prepared(serial, Ok(Vec::new()));
        }
        let (record, machine) = (container.record.clone(), self.machine_process()?);
        let control = self.plan.config.control_socket.clone();
        self.work(serial, move || {
            let added = if shares.is_empty() { Ok(()) } else { share::add(machine, &shares) };
            let given = added.map_err(Error::from).and_then(|()| Ok(block::give(&control, &blocks)?));
            Work::Prepared(given.and_then(|given| match hooks.run_before(&record) {
                Ok(()) => Ok(given),
                Err(error) => {
                    block::take(&control, &given);
                    Err(error.into())
                }
            }))
        })
    }

    fn prepared(&mut self, serial: Serial, done: Result<Vec<Given>, Error>) -> Result<(), Error> {
        let limit = self.plan.times.answer;
        let Some(container) = self.containers.get_mut(&serial) else { return Ok(()) };
        match done {
            Ok(given) => container.blocks = given,
            Err(error) => return self.fail(serial, error),
        }
        if container.unwanted {
            return self.fail(serial, Error::Cancelled(KILL));
        }
        container.stage = Stage::Making;
        container.due = Some((Instant::now() + limit, MAKE));
        let mut create = Box::new(container.plan.create.clone());
        create.devices = container.blocks.iter().map(|given| given.device.clone()).collect();
        Ok(self.calls.ask(Call::Create(create), Asked::Made(serial))?)
    }

    /// The agent has made a container, or could not.
    pub(super) fn made(&mut self, serial: Serial, outcome: Outcome) -> Result<(), Error> {
        let Some(container) = self.containers.get_mut(&serial) else { return Ok(()) };
        container.due = None;
        if let Outcome::Failed(failure) = outcome {
            // Nothing of it is left in the guest.
            container.stage = Stage::Leaving;
            return self.fail(serial, Error::Agent(failure));
        }
        container.stage = Stage::Showing;
        let hooks = container.plan.hooks.create_container.clone();
        if hooks.is_empty() {
            return self.shown(serial, Ok(()));
        }
        // Those of the first container are the machine's.
        let shares = if serial == self.first { &self.plan.config.shares } else { &container.shares };
        let (view, record) = (View::of(&container.plan, shares), container.record.clone());
        self.work(serial, move || {
            let shown = view.attach().map_err(Error::from);
            let run = || hooks::run("createContainer", &hooks, &record, Status::Creating);
            Work::Shown(shown.and_then(|()| Ok(run()?)))
        })
    }

    /// A container stands, unless hooks that were shown its files do not want it to.
    fn shown(&mut self, serial: Serial, done: Result<(), Error>) -> Result<(), Error> {
        let Some(container) = self.containers.get_mut(&serial) else { return Ok(()) };
        // It may have ended meanwhile.
        if !matches!(container.stage, Stage::Showing) {
            return Ok(());
        }
        if let Err(error) = done {
            return self.fail(serial, error);
        }
        if container.unwanted {
            return self.fail(serial, Error::Cancelled(KILL));
        }
        container.stage = Stage::Standing;
        if let Err(error) = container.become_(Transition::Created) {
            return self.fail(serial, error);
        }
        container.tell(Answer::Done);
        let detached = container.plan.detached;
        if serial == self.first {
            self.timeline.mark("create container");
            self.watcher.created();
        }
        if detached { Ok(()) } else { self.start(serial, None) }
    }

    /// Starts the process of a container that stands.
    pub(super) fn start(
        &mut self,
        serial: Serial,
        asker: Option<std::sync::mpsc::SyncSender<Answer>>,
    ) -> Result<(), Error> {
        let limit = self.plan.times.answer;
        let Some(container) = self.containers.get_mut(&serial) else { return Ok(()) };
        container.stage = Stage::Starting(asker);
        let name = container.name().to_owned();
        if serial == self.first
            && let Err(error) = self.set_up_network()
        {
            self.refuse_start(serial, &error);
            return Err(error);
        }
        // It may have ended meanwhile.
        let Some(container) = self.containers.get_mut(&serial) else { return Ok(()) };
        if !matches!(container.stage, Stage::Starting(_)) {
            return Ok(());
        }
        // Whoever has read its first word finds that it runs.
        if let Err(error) = container.become_(Transition::Started) {
            self.refuse_start(serial, &error);
            return self.fail(serial, error);
        }
        container.due = Some((Instant::now() + limit, START));
        Ok(self.calls.ask(Call::Start { container: name }, Asked::Started(serial))?)
    }

    /// Tells whoever wanted a process to be started that it was not.
    fn refuse_start(&mut self, serial: Serial, error: &Error) {
        let Some(container) = self.containers.get_mut(&serial) else { return };
        if let Stage::Starting(asker) = &mut container.stage {
            reply(asker.take(), Answer::refused(error.to_string()));
        }
    }

    /// The agent has started the process of a container, or could not.
    pub(super) fn started(&mut self, serial: Serial, outcome: Outcome) -> Result<(), Error> {
        let Some(container) = self.containers.get_mut(&serial) else { return Ok(()) };
        let Stage::Starting(asker) = &mut container.stage else { return Ok(()) };
        let asker = asker.take();
        container.due = None;
        if let Outcome::Failed(failure) = outcome {
            container.stage = Stage::Leaving;
            let error = Error::Agent(failure);
            reply(asker, Answer::refused(error.to_string()));
            return self.fail(serial, error);
        }
        container.stage = Stage::Running;
        (container.hooks_awaited, container.starter) = (true, asker);
        let (after, record) = (container.plan.hooks.poststart.clone(), container.record.clone());
        if serial == self.first {
            self.timeline.mark("start process");
            self.run_until = self.plan.times.run.map(|limit| Instant::now() + limit);
            self.watcher.started();
        }
        if after.is_empty() {
            self.hooked(serial, &[]);
            return Ok(());
        }
        self.work(serial, move || {
            let failed = hooks::run_all("poststart", &after, &record, Status::Running);
            Work::Hooked(failed.iter().map(ToString::to_string).collect())
        })
    }

    fn hooked(&mut self, serial: Serial, failed: &[String]) {
        let Some(container) = self.containers.get_mut(&serial) else { return };
        container.hooks_awaited = false;
        match container.starter.take() {
            Some(asker) if failed.is_empty() => reply(Some(asker), Answer::Done),
            Some(asker) => reply(Some(asker), Answer::Data { value: failed.into() }),
            None => failed.iter().for_each(|failed| self.watcher.warn(failed)),
        }
    }

    /// A process has ended, the guest says.
    pub(super) fn exited(&mut self, container: &str, process: &str, exit: Exit) -> Result<(), Error> {
        const NOBODY: Error = Error::Protocol("it reports the end of a process that does not exist");
        let first = self.first;
        let container = self.in_guest(container).ok_or(NOBODY)?;
        if !process.is_empty() {
            return container.execs.exited(process, exit.status);
        }
        match &mut container.stage {
            Stage::Showing => {
                container.exit = Some(exit);
                let (serial, failed) = (container.serial, container.last_word.is_some());
                return if failed { self.leave(serial) } else { self.fail(serial, Error::EndedEarly) };
            }
            Stage::Standing | Stage::Starting(_) | Stage::Running => {}
            _ => return Err(NOBODY),
        }
        if let Stage::Starting(asker) = &mut container.stage {
            reply(asker.take(), Answer::refused("its process has ended"));
        }
        let is_first = container.serial == first;
        container.exit = Some(exit);
        container.oom_kills.end(Instant::now());
        container.last_word = Some(Answer::Exited { status: exit.status });
        container.due = None;
        container.stage = Stage::Draining(Instant::now(), container.streams.progress());
        // Whoever waits for the end finds it.
        if exit.out_of_memory
            && let Err(error) = engine::note_out_of_memory(&container.record)
        {
            self.watcher.warn(&format!("cannot tell the engine of the lack of memory: {error}"));
        }
        if is_first {
            self.run_until = None;
            self.timeline.mark("run");
        }
        Ok(())
    }

    /// The memory limit has killed something in a container, the guest says. One that has ended is past caring.
    pub(super) fn out_of_memory(&mut self, container: &str) -> Result<(), Error> {
        const NOBODY: Error =
            Error::Protocol("it reports a lack of memory of a container that does not exist");
        let container = self.in_guest(container).ok_or(NOBODY)?;
        if container.exit.is_none() {
            container.oom_kills.happened(Instant::now());
        }
        Ok(())
    }

    /// Leads on those that have ended, and tells what it is time to tell. Returns how the first has, once all of it has
    /// been delivered.
    pub(super) fn advance(&mut self) -> Result<Option<Exit>, Error> {
        let serials: Vec<Serial> = self.containers.keys().copied().collect();
        for serial in serials {
            let Some(container) = self.containers.get_mut(&serial) else { continue };
            container.oom_kills.tell(Instant::now());
            match container.settle(Instant::now()) {
                Ok(Settled::NotYet) => {}
                Ok(Settled::Yes) if serial == self.first => {
                    self.timeline.mark("drain output");
                    return Ok(self.first().exit);
                }
                Ok(Settled::Yes) => self.leave(serial)?,
                Err(error) => self.fail(serial, error)?,
            }
        }
        Ok(None)
    }

    /// A container has met an error, which is its end.
    pub(super) fn fail(&mut self, serial: Serial, error: Error) -> Result<(), Error> {
        if serial == self.first {
            return Err(error);
        }
        let Some(container) = self.containers.get_mut(&serial) else { return Ok(()) };
        container.last_word = Some(match container.record.status {
            Status::Creating => Answer::refused(error.to_string()),
            _ => {
                let code = exit::code_of(&Ending::of(&error));
                Answer::Exited { status: sandbox_protocol::ExitStatus::Code(code) }
            }
        });
        if container.may_live() {
            // It leaves when it has ended, and has said its last word.
            return self.kill(serial);
        }
        self.leave(serial)
    }

    /// Has a container's files taken away. The guest forgets it then.
    fn leave(&mut self, serial: Serial) -> Result<(), Error> {
        let Some(container) = self.containers.get_mut(&serial) else { return Ok(()) };
        container.stage = Stage::Leaving;
        (container.due, container.cut) = (None, None);
        reply(container.starter.take(), Answer::Done);
        let (shares, machine) = (container.shares.clone(), self.machine_process()?);
        if shares.is_empty() {
            return self.left(serial);
        }
        self.work(serial, move || {
            // A machine that is gone has taken them with it.
            let _ = share::remove(machine, &shares);
            Work::Left
        })
    }

    fn left(&mut self, serial: Serial) -> Result<(), Error> {
        let limit = self.plan.times.answer;
        let Some(container) = self.containers.get_mut(&serial) else { return Ok(()) };
        container.due = Some((Instant::now() + limit, FORGET));
        let share = container.shares.first().and_then(top_of);
        let call = Call::Delete { container: container.name().to_owned(), share };
        Ok(self.calls.ask(call, Asked::Deleted(serial))?)
    }

    /// The guest has forgotten a container, or says that it has. Its block devices are taken away only now: what it
    /// wrote to them has come to them.
    pub(super) fn forgotten(&mut self, serial: Serial) -> Result<(), Error> {
        let Some(container) = self.containers.get_mut(&serial) else { return Ok(()) };
        container.due = None;
        let given = std::mem::take(&mut container.blocks);
        if given.is_empty() {
            self.gone(serial);
            return Ok(());
        }
        let control = self.plan.config.control_socket.clone();
        self.work(serial, move || {
            block::take(&control, &given);
            Work::Gone
        })
    }

    /// Nothing of a container is left in the machine.
    pub(super) fn gone(&mut self, serial: Serial) {
        let Some(mut container) = self.containers.remove(&serial) else { return };
        // It has stopped, whether that can be written or not.
        let _ = container.stop();
        let (owner, word) = (container.owner.take(), container.last_word.take());
        // Whoever hears of the end finds it stopped.
        drop(container);
        if let (Some(owner), Some(word)) = (owner, word) {
            let _ = owner.try_send(word);
        }
    }

    /// Whoever made a container and answers for it is gone.
    pub(super) fn owner_gone(&mut self, serial: Serial) -> Result<(), Error> {
        let Some(container) = self.containers.get_mut(&serial) else { return Ok(()) };
        container.unwanted = true;
        container.oom_kills.end(Instant::now());
        if container.may_live() { self.kill(serial) } else { Ok(()) }
    }

    /// Kills the process of a container; if that does not end it, the machine is cut off.
    pub(super) fn kill(&mut self, serial: Serial) -> Result<(), Error> {
        let Some(container) = self.containers.get_mut(&serial) else { return Ok(()) };
        container.cut.get_or_insert(Instant::now() + STOP_TIME);
        let call = Call::Signal {
            container: container.name().to_owned(),
            process: String::new(),
            signal: rustix::process::Signal::KILL.as_raw(),
            all: false,
        };
        Ok(self.calls.ask(call, Asked::Outside(None))?)
    }

    /// Something has not happened in its time.
    pub(super) fn overdue(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        let limit = self.plan.times.answer;
        if let (Some(until), Some(limit)) = (self.run_until, self.plan.times.run)
            && until <= now
        {
            return Err(Error::TimedOut(limit));
        }
        let serials: Vec<Serial> = self.containers.keys().copied().collect();
        for serial in serials {
            let Some(container) = self.containers.get_mut(&serial) else { continue };
            if container.exit.is_none() && container.cut.is_some_and(|cut| cut <= now) {
                if serial == self.first || container.abandoned {
                    return Err(Error::Killed);
                }
                // Its end may wait for a reader of ours, and that is no reason to end the others.
                container.streams.abandon();
                container.abandoned = true;
                container.cut = Some(now + STOP_TIME);
            }
            let Some((_, step)) = container.due.filter(|(due, _)| *due <= now) else { continue };
            let error = Error::NoAnswer { step, limit };
            match step {
                FORGET => return Err(error),
                _ => {
                    container.due = None;
                    container.unwanted = true;
                    container.tell(Answer::refused(error.to_string()));
                    self.fail(serial, error)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn worked(&mut self, serial: Serial, work: Work) -> Result<(), Error> {
        match work {
            Work::Prepared(done) => self.prepared(serial, done),
            Work::Shown(done) => self.shown(serial, done),
            Work::Hooked(failed) => {
                self.hooked(serial, &failed);
                Ok(())
            }
            Work::Left => self.left(serial),
            Work::Gone => {
                self.gone(serial);
                Ok(())
            }
        }
    }

    fn machine_process(&self) -> Result<std::os::fd::OwnedFd, Error> {
        self.machine
            .descriptor()
            .map_err(|error| Error::Host { step: "copy the machine's descriptor", error })
    }

    /// Does something on the host that may take its time.
    fn work(&self, serial: Serial, work: impl FnOnce() -> Work + Send + 'static) -> Result<(), Error> {
        let sender = self.inbox.sender();
        let body = move || {
            let _ = sender.send(Event::Worked(serial, work()));
        };
        thread::spawn("host-work", body)
            .map(drop)
            .map_err(|error| Error::Host { step: "start a thread for a container", error })
    }
}

impl Container {
    /// Whether the agent has, or may have, a process of it that has not ended.
    fn may_live(&self) -> bool {
        self.exit.is_none()
            && matches!(
                self.stage,
                Stage::Making | Stage::Showing | Stage::Standing | Stage::Starting(_) | Stage::Running
            )
    }

    /// Waits, as long as that makes sense, until all output has been delivered: for as long as it moves or our own
    /// side is slow, or hooks are running that come before those of its end. Added processes end with the container;
    /// whoever asked for them hears of it, if that takes no time.
    fn settle(&mut self, now: Instant) -> Result<Settled, Error> {
        if let Stage::Draining(moved, before) = self.stage {
            let progress = self.streams.progress();
            // Whoever kills it does not want to wait for a reader that never comes.
            let cut = self.abandoned || self.cut.is_some_and(|cut| cut <= now);
            if cut || (self.streams.are_drained() && !self.hooks_awaited) {
                self.cut = None;
                self.stage = Stage::Settling(now + SETTLE_TIME);
                reply(self.starter.take(), Answer::Done);
            } else if self.hooks_awaited || progress.is_none() || progress != before {
                self.stage = Stage::Draining(now, progress);
            } else if now.duration_since(moved) > DRAIN_TIME {
                return Err(Error::NoDrain(DRAIN_TIME));
            }
        }
        match self.stage {
            Stage::Settling(until) if self.execs.is_empty() || until <= now => Ok(Settled::Yes),
            _ => Ok(Settled::NotYet),
        }
    }
}

/// The directory of the share in which a container's entries are.
fn top_of(entry: &ShareEntry) -> Option<String> {
    let top = entry.path.components().next()?;
    Some(top.as_os_str().to_string_lossy().into_owned())
}
