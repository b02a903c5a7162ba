//! A monitor's socket, by which other commands ask something of its sandbox: one line of JSON there, one back.
//!
//! [`Request::Exec`] and [`Request::Join`] are longer conversations: the standard streams come with the first bytes of
//! the line, and the connection then carries requests for the new process or container, and back how it goes. The
//! answers to [`Request::WatchMemory`] come until the container ends.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use sandbox_protocol::ExitStatus;
use sandbox_vmm_api::socket;
use serde::de::DeserializeOwned;

use crate::listening::{ListenError, Listening};
use crate::sandbox::{
    Answer, Claimed, ContainerPlan, Ends, Error, Event, ExecRequest, Newcomer, Request, Sender, Serial,
};
use crate::state::StateDir;
use crate::{descriptor, thread};

/// The most bytes of a line: a container's configuration may be large.
const MAX_LINE_BYTES: u64 = super::MAX_LIFELINE_BYTES as u64;

/// How long either side waits for the other's line.
const LINE_TIME: Duration = Duration::from_secs(2);

/// How long the sandbox may take to do what it is asked: the time of the agent's own answers, and some more.
const ANSWER_TIME: Duration = Duration::from_secs(70);

/// The most conversations at a time.
const MAX_CONVERSATIONS: usize = 512;

/// Why a sandbox did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens, or the connection failed.
    #[error("the sandbox cannot be asked over {}: {error}", path.display())]
    Connection {
        /// The socket.
        path: std::path::PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It said no.
    #[error("{0}")]
    Refused(String),
}

/// Claims the directory of a container to be, and answers requests for it on the socket there.
pub fn claim(plan: ContainerPlan, sender: Sender) -> Result<Claimed, Error> {
    let directory = StateDir::claim(&plan.root, &plan.id)?;
    let serial = Serial::next();
    let listening = listen(&directory.paths().monitor_socket(), serial, sender)?;
    Ok(Claimed { serial, plan, listening, directory })
}

/// How long those who have asked may take to take their answers when the monitor is about to end.
const LAST_TIME: Duration = Duration::from_secs(1);

/// How many conversations go on, over all sockets.
static CONVERSATIONS: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

/// One of them, as long as this lives.
struct Conversation;

impl Conversation {
    fn begin() -> Self {
        *CONVERSATIONS.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Self
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        *CONVERSATIONS.0.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        CONVERSATIONS.1.notify_all();
    }
}

/// Waits until those who have asked have heard how it ends, or have not listened.
pub fn finish() {
    let going = CONVERSATIONS.0.lock().unwrap_or_else(PoisonError::into_inner);
    drop(CONVERSATIONS.1.wait_timeout_while(going, LAST_TIME, |going| *going > 0));
}

/// Answers requests for a container on a socket, each connection in a thread of its own.
fn listen(path: &Path, container: Serial, sender: Sender) -> Result<Listening, ListenError> {
    let (listening, listener) = Listening::on(path)?;
    let body = move || {
        let conversations = Arc::new(());
        for (number, connection) in listener.incoming().map_while(Result::ok).enumerate() {
            if Arc::strong_count(&conversations) > MAX_CONVERSATIONS {
                continue;
            }
            let (sender, counted) = (sender.clone(), (Arc::clone(&conversations), Conversation::begin()));
            // A caller that does not keep to the rules has only itself to blame.
            let _ = thread::spawn("request", move || {
                let _ = serve(connection, container, &sender, number);
                drop(counted);
            });
        }
    };
    thread::spawn("requests", body).map_err(ListenError::at(path))?;
    Ok(listening)
}

fn serve(connection: UnixStream, container: Serial, sender: &Sender, number: usize) -> io::Result<()> {
    let (request, descriptors) = read_request(&connection)?;
    match request {
        Request::Exec { process } => {
            let (asker, answers) = sync_channel(2);
            let name = format!("exec-{number}");
            let ends = ends_of(descriptors);
            let request = ExecRequest { name: name.clone(), process, ends, asker };
            let to = Asked::Process(container, name);
            match sender.send(Event::Exec(container, request)) {
                Ok(()) => attend(connection, sender, to, &answers),
                Err(_) => write_line(&connection, &Answer::refused(ENDING)),
            }
        }
        Request::Join { container: mut plan, shares } => {
            plan.stand_in = Some(peer(&connection)?);
            let (owner, answers) = sync_channel(2);
            let place = match claim(*plan, sender.clone()) {
                Ok(place) => place,
                Err(error) => return write_line(&connection, &Answer::refused(error.to_string())),
            };
            let to = Asked::Container(place.serial);
            let newcomer = Newcomer { place, ends: ends_of(descriptors), shares, owner };
            match sender.send(Event::Join(Box::new(newcomer))) {
                Ok(()) => attend(connection, sender, to, &answers),
                Err(_) => write_line(&connection, &Answer::refused(ENDING)),
            }
        }
        Request::WatchMemory => {
            let (watcher, answers) = sync_channel(2);
            match sender.send(Event::Request(container, request, Some(watcher))) {
                Ok(()) => answers.iter().try_for_each(|answer| write_line(&connection, &answer)),
                Err(_) => write_line(&connection, &Answer::refused(ENDING)),
            }
        }
        request => {
            let (asker, answer) = sync_channel(1);
            let answer = match sender.send(Event::Request(container, request, Some(asker))) {
                Ok(()) => answer.recv_timeout(ANSWER_TIME).unwrap_or_else(|_| Answer::refused(NO_ANSWER)),
                Err(_) => Answer::refused(ENDING),
            };
            write_line(&connection, &answer)
        }
    }
}

fn ends_of(descriptors: Vec<OwnedFd>) -> Ends {
    let mut descriptors = descriptors.into_iter();
    let mut next = || descriptors.next();
    Ends { stdin: next(), stdout: next(), stderr: next() }
}

/// What a longer conversation is about.
#[derive(Clone)]
enum Asked {
    Container(Serial),
    Process(Serial, String),
}

impl Asked {
    fn request(&self, request: Request) -> Event {
        match self {
            Self::Container(container) => Event::Request(*container, request, None),
            Self::Process(container, process) => Event::ToExec(*container, process.clone(), request),
        }
    }

    fn gone(self) -> Event {
        match self {
            Self::Container(container) => Event::OwnerGone(container),
            Self::Process(container, process) => Event::ExecGone(container, process),
        }
    }
}

const NO_ANSWER: &str = "the sandbox did not answer; it may be ending";
const ENDING: &str = "container not running: the sandbox is ending";

/// Tells the asker how it goes, and the driver what the asker wants.
fn attend(connection: UnixStream, sender: &Sender, to: Asked, answers: &Receiver<Answer>) -> io::Result<()> {
    connection.set_read_timeout(None)?;
    let (reader, to_driver) = (connection.try_clone()?, sender.clone());
    thread::spawn("asker", move || {
        let mut reader = BufReader::new(&reader);
        while let Ok(request) = read_line::<Request>(&mut reader) {
            if to_driver.send(to.request(request)).is_err() {
                return;
            }
        }
        let _ = to_driver.send(to.gone());
    })?;
    for answer in answers {
        write_line(&connection, &answer)?;
    }
    // Ends the other thread, too.
    let _ = connection.shutdown(std::net::Shutdown::Both);
    Ok(())
}

/// Asks the sandbox whose socket this is.
pub fn ask(path: &Path, request: &Request) -> Result<Answer, AskError> {
    let exchange = || {
        let connection = socket::connect(path)?;
        write_line(&connection, request)?;
        connection.set_read_timeout(Some(ANSWER_TIME + LINE_TIME))?;
        read_line(&mut BufReader::new(&connection))
    };
    refused(exchange(), path)
}

/// The process that listens on a sandbox's socket: its monitor.
pub fn listener(path: &Path) -> io::Result<u32> {
    peer(&socket::connect(path)?)
}

fn peer(connection: &UnixStream) -> io::Result<u32> {
    let credentials = rustix::net::sockopt::socket_peercred(connection)?;
    Ok(credentials.pid.as_raw_nonzero().get().cast_unsigned())
}

fn refused(answer: io::Result<Answer>, path: &Path) -> Result<Answer, AskError> {
    match answer {
        Ok(Answer::Refused { message }) => Err(AskError::Refused(crate::printable::printable(&message))),
        Ok(answer) => Ok(answer),
        Err(error) => Err(AskError::Connection { path: path.into(), error }),
    }
}

/// A process that was added to a container, or a container that was added to a sandbox, seen from outside.
#[derive(Debug)]
pub struct Added {
    connection: UnixStream,
    reader: BufReader<UnixStream>,
    path: std::path::PathBuf,
}

impl Added {
    /// Asks for a process with these standard streams, which it alone has from then on; returns when it runs.
    pub fn start(path: &Path, process: &oci_spec::runtime::Process, ends: Ends) -> Result<Self, AskError> {
        let request = Request::Exec { process: Box::new(process.clone()) };
        let mut added = Self::ask_for(path, &request, ends)?;
        let answered = added.connection.set_read_timeout(Some(ANSWER_TIME + LINE_TIME));
        answered.map_err(|error| AskError::Connection { path: path.into(), error })?;
        added.stands()?;
        Ok(added)
    }

    /// Asks for what comes with standard streams.
    pub fn ask_for(path: &Path, request: &Request, ends: Ends) -> Result<Self, AskError> {
        let ask = || {
            let connection = socket::connect(path)?;
            let streams: Vec<_> =
                [&ends.stdin, &ends.stdout, &ends.stderr].into_iter().flatten().map(AsFd::as_fd).collect();
            descriptor::send(&connection, &line(request)?, &streams)?;
            Ok((BufReader::new(connection.try_clone()?), connection))
        };
        let (reader, connection) =
            ask().map_err(|error| AskError::Connection { path: path.into(), error })?;
        Ok(Self { connection, reader, path: path.into() })
    }

    /// Takes the word that it stands, or why not.
    pub fn stands(&mut self) -> Result<(), AskError> {
        refused(read_line(&mut self.reader), &self.path)?;
        let unlimited = self.connection.set_read_timeout(None);
        unlimited.map_err(|error| AskError::Connection { path: self.path.clone(), error })
    }

    /// Asks for something that concerns it. One that has ended is past caring.
    pub fn ask(&self, request: &Request) {
        let _ = write_line(&self.connection, request);
    }

    /// A way to ask for something, for whoever does not wait for the end. The process lives as long as there is one,
    /// or this.
    pub fn asker(&self) -> io::Result<Asker> {
        self.connection.try_clone().map(Asker)
    }

    /// Whether something about it has come and is not taken yet.
    pub fn has_news(&self) -> bool {
        !self.reader.buffer().is_empty()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus, AskError> {
        match refused(read_line(&mut self.reader), &self.path)? {
            Answer::Exited { status } => Ok(status),
            _ => Err(AskError::Refused("the sandbox gave an answer that makes no sense".into())),
        }
    }
}

/// Kills for lack of memory in a container, as they happen.
#[derive(Debug)]
pub struct MemoryWatch(BufReader<UnixStream>);

impl MemoryWatch {
    /// Watches the container whose request socket this is.
    pub fn start(path: &Path) -> Result<Self, AskError> {
        let ask = || {
            let connection = socket::connect(path)?;
            write_line(&connection, &Request::WatchMemory)?;
            Ok(Self(BufReader::new(connection)))
        };
        ask().map_err(|error| AskError::Connection { path: path.into(), error })
    }

    /// Waits until there was one, or several. `false`: there will be no more, or `end` has become readable, and a
    /// moment later no more was told.
    pub fn wait(&mut self, end: impl AsFd) -> bool {
        if self.0.buffer().is_empty() {
            let sources = [self.0.get_ref().as_fd(), end.as_fd()];
            let mut ready = sources.map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN));
            while matches!(rustix::event::poll(&mut ready, None), Err(Errno::INTR)) {}
            let [told, _] = ready.map(|source| !source.revents().is_empty());
            if !told && self.0.get_ref().set_read_timeout(Some(LAST_TIME)).is_err() {
                return false;
            }
        }
        matches!(read_line(&mut self.0), Ok(Answer::OutOfMemory))
    }
}

/// Asks for what concerns an added process.
#[derive(Debug)]
pub struct Asker(UnixStream);

impl Asker {
    /// Asks. A process that has ended is past caring.
    pub fn ask(&self, request: &Request) {
        let _ = write_line(&self.0, request);
    }
}

impl AsFd for Added {
    /// Becomes readable when the process has ended.
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

fn line(value: &impl serde::Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

fn write_line(mut to: &UnixStream, value: &impl serde::Serialize) -> io::Result<()> {
    to.write_all(&line(value)?)
}

/// Reads a request's line and the descriptors that came with it.
fn read_request(from: &UnixStream) -> io::Result<(Request, Vec<OwnedFd>)> {
    let deadline = Instant::now() + LINE_TIME;
    let (mut line, mut descriptors, mut buffer) = (Vec::new(), Vec::new(), [0; 16 << 10]);
    while !line.ends_with(b"\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        from.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let (bytes, more) = descriptor::receive(from, &mut buffer)?;
        if bytes == 0 || line.len() as u64 > MAX_LINE_BYTES {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend_from_slice(buffer.get(..bytes).unwrap_or_default());
        descriptors.extend(more);
    }
    Ok((serde_json::from_slice(&line)?, descriptors))
}

fn read_line<T: DeserializeOwned>(from: &mut impl BufRead) -> io::Result<T> {
    let mut line = Vec::new();
    from.take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
    if !line.ends_with(b"\n") {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&line)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Inbox;

    fn same(one: &Request, other: &Request) -> bool {
        line(one).unwrap() == line(other).unwrap()
    }

    #[test]
    fn a_request_reaches_the_driver_and_its_answer_the_asker() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let inbox = Inbox::new();
        let _listening = listen(&path, Serial::next(), inbox.sender()).unwrap();
        let asker = {
            let path = path.clone();
            std::thread::spawn(move || (ask(&path, &Request::Start), ask(&path, &Request::Interrupt)))
        };
        for (expected, answer) in
            [(Request::Start, Answer::Done), (Request::Interrupt, Answer::refused("no"))]
        {
            match inbox.next(None).unwrap() {
                Event::Request(_, request, Some(to)) if same(&request, &expected) => to.send(answer).unwrap(),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(listener(&path).unwrap(), std::process::id());
        let (first, second) = asker.join().unwrap();
        first.unwrap();
        assert_eq!(second.unwrap_err().to_string(), "no");
    }

    #[test]
    fn an_added_process_has_the_streams_that_came_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let inbox = Inbox::new();
        let _listening = listen(&path, Serial::next(), inbox.sender()).unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let asker = std::thread::spawn(move || {
            let process = oci_spec::runtime::Process::default();
            let null = || Some(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
            let ends = Ends { stdin: null(), stdout: Some(writer.into()), stderr: null() };
            let mut added = Added::start(&path, &process, ends).unwrap();
            added.ask(&Request::Signal { signal: 15, all: false });
            added.wait().unwrap()
        });
        let Some(Event::Exec(_, request)) = inbox.next(None) else { panic!("no exec") };
        request.asker.send(Answer::Done).unwrap();
        let mut stdout = std::fs::File::from(request.ends.stdout.unwrap());
        stdout.write_all(b"through").unwrap();
        drop(stdout);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
        let Some(Event::ToExec(_, name, wanted)) = inbox.next(None) else { panic!("no signal") };
        assert!(name == request.name && same(&wanted, &Request::Signal { signal: 15, all: false }));
        request.asker.send(Answer::Exited { status: ExitStatus::Code(3) }).unwrap();
        drop(request.asker);
        assert_eq!(asker.join().unwrap(), ExitStatus::Code(3));
    }

    #[test]
    fn whoever_watches_memory_hears_of_kills_until_the_container_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let inbox = Inbox::new();
        let _listening = listen(&path, Serial::next(), inbox.sender()).unwrap();
        let ((end, _alive), (ended, _)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let mut watch = MemoryWatch::start(&path).unwrap();
        let Some(Event::Request(_, Request::WatchMemory, Some(watcher))) = inbox.next(None) else {
            panic!("nobody watches")
        };
        watcher.send(Answer::OutOfMemory).unwrap();
        assert!(watch.wait(&end));
        watcher.send(Answer::OutOfMemory).unwrap();
        assert!(watch.wait(&ended), "what was told before the end is heard after it");
        assert!(!watch.wait(&ended), "nobody says any more");
        drop(watcher);
        assert!(!watch.wait(&end));
    }

    #[test]
    fn nonsense_is_hung_up_on() {
        let inbox = Inbox::new();
        for bytes in [&b"{}\n"[..], b"\n", b"[1,2", &[b'x'; 20_000]] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(bytes).unwrap();
            theirs.shutdown(std::net::Shutdown::Write).unwrap();
            assert!(serve(ours, Serial::next(), &inbox.sender(), 1).is_err());
        }
        assert!(inbox.next(Some(std::time::Instant::now())).is_none());
    }
}
