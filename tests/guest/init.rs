//! The probe as the only program of a guest.
//!
//! `probe=TASK` on the kernel's command line, or else the file `/task`, says what is done first; then lines from
//! the host are, each answered by a line, until the host closes the connection; then the guest powers off.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::mount::{MountFlags, mount};
use sandbox_tests::pattern::{Checksum, sequence};
use sandbox_tests::vmm::REPORT_PORT;
use sandbox_vmm_api::{POWER_OFF_PORT, POWER_OFF_VALUE, SHARE_TAG};

use crate::{Outcome, lie, memory, net, read_only};

/// The host's context id.
const HOST_CID: u32 = 2;

/// Does what it is told; never returns.
pub fn run() -> ! {
    for (kind, place) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        // What is missing shows in the task that needs it.
        let _ = mount(kind, place, kind, MountFlags::empty(), None);
    }
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let on_the_line = line.split_whitespace().find_map(|word| word.strip_prefix("probe=")).map(str::to_owned);
    let task = on_the_line.unwrap_or_else(|| fs::read_to_string("/task").unwrap_or_default());
    if let Ok(connection) = dial(REPORT_PORT) {
        let mut guest = Guest { memory: vec![] };
        guest.serve(&task, &connection);
    } else {
        // A machine without vsock: the task alone.
        let _ = Guest { memory: vec![] }.obey(&task);
    }
    power_off()
}

struct Guest {
    memory: Vec<u8>,
}

impl Guest {
    fn serve(&mut self, task: &str, mut connection: &File) {
        let mut orders = BufReader::new(connection);
        let mut order = task.to_owned();
        loop {
            let answer = match self.obey(order.trim()) {
                Ok(done) => format!("{}: {done}\n", order.trim()),
                Err(why) => format!("{}: FAILED: {why}\n", order.trim()),
            };
            order.clear();
            if connection.write_all(answer.as_bytes()).is_err()
                || !matches!(orders.read_line(&mut order), Ok(1..))
            {
                return;
            }
        }
    }

    /// Carries out one order, words with commas or blanks between them.
    fn obey(&mut self, order: &str) -> Result<String, String> {
        let words: Vec<&str> = order.split([',', ' ']).collect();
        let word = |index: usize| words.get(index).copied().ok_or(format!("word {index} is missing"));
        match words[0] {
            "nothing" => Ok("done".into()),
            "sleep" => loop {
                std::thread::sleep(Duration::from_secs(1000));
            },
            "cpus" => Ok(processors()),
            "print" => print(word(1)?).map(|()| "done".into()),
            "panic" => Err(panic_the_kernel()),
            "reset" => Err(reset()),
            "allocate" => {
                self.memory = memory::take(word(1)?.parse().map_err(|e| format!("{e}"))?);
                Ok("done".into())
            }
            "free" => {
                self.memory = vec![];
                Ok("done".into())
            }
            "random" => random(),
            "read-disk" => read_disk(word(1)?),
            "write-disk" => write_disk(word(1)?, word(2)?.parse().map_err(|e| format!("{e}"))?),
            "net" => {
                net::configure(word(1)?.parse().map_err(|e| format!("{e}"))?)?;
                net::echo(word(2)?).map(|()| "echoed".into())
            }
            "mount-share" => {
                mount(SHARE_TAG, "/mnt", "virtiofs", MountFlags::empty(), None).map_err(|e| e.to_string())?;
                Ok("done".into())
            }
            "try-writes" => read_only::check(&[word(1)?.to_owned()]).map(|()| "all refused".into()),
            "read-file" => read(word(1)?, &mut open(word(1)?)?),
            "tick" => Ok(ticks()),
            "ports" => ports(),
            "lie" => lie::tell(word(1)?).map(|()| "done".into()),
            "die" => lie::serve_until(word(1)?).and_then(|()| Err(panic_the_kernel())),
            unknown => Err(format!("unknown order {unknown}")),
        }
    }
}

/// Connects to a port of the host.
pub fn dial(port: u32) -> std::io::Result<File> {
    let family = libc::AF_VSOCK;
    // SAFETY: the call takes no memory.
    let socket = unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: a sockaddr_vm of zeros is a valid one.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = family.cast_unsigned() as u16;
    address.svm_cid = HOST_CID;
    address.svm_port = port;
    let size = size_of_val(&address) as u32;
    // SAFETY: the address outlives the call and the size is its own.
    let result =
        unsafe { libc::connect(std::os::fd::AsRawFd::as_raw_fd(&socket), (&raw const address).cast(), size) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(File::from(socket)) }
}

fn processors() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines().filter(|line| line.starts_with("processor")).count().to_string()
}

fn print(text: &str) -> Outcome {
    let mut console =
        fs::OpenOptions::new().write(true).open("/dev/console").map_err(|e| format!("console: {e}"))?;
    writeln!(console, "{text}").map_err(|e| format!("console: {e}"))
}

fn panic_the_kernel() -> String {
    let _ = fs::write("/dev/kmsg", "probe: these are the last words");
    // Process 1 must not end: the kernel panics.
    std::process::exit(1)
}

fn reset() -> String {
    rustix::system::reboot(rustix::system::RebootCommand::Restart)
        .err()
        .map_or(String::new(), |e| e.to_string())
}

fn random() -> Result<String, String> {
    let name =
        fs::read_to_string("/sys/class/misc/hw_random/rng_current").map_err(|e| format!("rng: {e}"))?;
    let mut bytes = [0; 64];
    open("/dev/hwrng")?.read_exact(&mut bytes).map_err(|e| format!("/dev/hwrng: {e}"))?;
    let different = bytes.iter().collect::<std::collections::BTreeSet<_>>().len();
    Ok(format!("{} {}", name.trim(), if different > 16 { "random" } else { "constant" }))
}

fn open(path: &str) -> Result<File, String> {
    File::open(path).map_err(|e| format!("{path}: {e}"))
}

fn read_disk(name: &str) -> Result<String, String> {
    let read_only =
        fs::read_to_string(format!("/sys/block/{name}/ro")).map_err(|e| format!("{name}: {e}"))?;
    let sum = read(name, &mut open(&format!("/dev/{name}"))?)?;
    Ok(format!("{sum} ro={}", read_only.trim()))
}

fn read(name: &str, file: &mut File) -> Result<String, String> {
    let mut sum = Checksum::default();
    let mut buffer = vec![0; 128 << 10];
    loop {
        match file.read(&mut buffer).map_err(|e| format!("{name}: {e}"))? {
            0 => return Ok(sum.to_string()),
            n => sum.add(&buffer[..n]),
        }
    }
}

fn write_disk(name: &str, bytes: usize) -> Result<String, String> {
    let path = Path::new("/dev").join(name);
    let mut disk = fs::OpenOptions::new().write(true).open(path).map_err(|e| format!("{name}: {e}"))?;
    disk.seek(SeekFrom::Start(0))
        .and_then(|_| disk.write_all(&sequence(bytes)))
        .map_err(|e| format!("{name}: {e}"))?;
    disk.sync_all().map_err(|e| format!("{name}: sync: {e}"))?;
    Ok("written".into())
}

/// The guest's own uptime, in hundredths of a second.
fn ticks() -> String {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split_whitespace().next().unwrap_or_default().replace('.', "")
}

/// Reads of ports where no device is, one of them that of a serial port: ones, never anything of the host's.
fn ports() -> Result<String, String> {
    allow_ports()?;
    let values: Vec<u8> = [0x300, 0x3f8].into_iter().map(read_port).collect();
    Ok(format!("{values:02x?}"))
}

fn allow_ports() -> Outcome {
    // SAFETY: the call takes no memory.
    if unsafe { libc::iopl(3) } < 0 {
        Err(format!("iopl: {}", std::io::Error::last_os_error()))
    } else {
        Ok(())
    }
}

fn read_port(port: u16) -> u8 {
    let value;
    // SAFETY: `iopl` allowed it, and reading these ports has no effect on memory.
    unsafe { std::arch::asm!("in al, dx", out("al") value, in("dx") port, options(nomem, nostack)) };
    value
}

fn power_off() -> ! {
    rustix::fs::sync();
    let _ = allow_ports();
    // SAFETY: `iopl` allowed it; the machine ends here.
    unsafe {
        std::arch::asm!("out dx, al", in("al") POWER_OFF_VALUE, in("dx") POWER_OFF_PORT, options(nomem, nostack))
    };
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}
