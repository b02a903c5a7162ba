//! `sandbox events`.

use std::time::Duration;

use sandbox_protocol::Stats;
use serde::Serialize;
use serde_json::{Value, json};

use super::{Error, Global, print};
use crate::lifecycle;
use crate::monitor::AskError;
use crate::quantity::Span;
use crate::state::{SandboxId, StateError};

/// How often the stream has numbers.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(5);

// The arguments of `sandbox events`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The sandbox
    id: SandboxId,
    /// Print the numbers once
    #[arg(long)]
    stats: bool,
    /// How often to print them
    #[arg(long, value_name = "DURATION")]
    interval: Option<Span>,
}

/// Prints what a sandbox uses, as a line of JSON, once or until it ends.
pub fn events(args: &Args, global: &Global) -> Result<u8, Error> {
    let interval = args.interval.map_or(DEFAULT_INTERVAL, |span| span.0);
    let mut oom_kills = None;
    loop {
        let stats = match lifecycle::stats(&args.id, &global.root()?) {
            // It ended, or was deleted, meanwhile.
            Err(error) if oom_kills.is_some() && ended(&error) => return Ok(0),
            stats => stats?,
        };
        let kills = stats.memory.events.oom_kill;
        if oom_kills.is_some_and(|before| before < kills) {
            tell("oom", &args.id, None)?;
        }
        oom_kills = Some(kills);
        tell("stats", &args.id, Some(data(&stats)))?;
        if args.stats {
            return Ok(0);
        }
        std::thread::sleep(interval);
    }
}

/// A line of the stream. Scripts look for the type at its beginning, where runc has it.
#[derive(Serialize)]
struct Event<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: &'a SandboxId,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Value>,
}

fn tell(kind: &'static str, id: &SandboxId, data: Option<Value>) -> Result<(), Error> {
    let line = serde_json::to_string(&Event { kind, id, data }).map_err(|e| Error::Failed(e.to_string()))?;
    print(&format!("{line}\n"))
}

/// Whether an error says that the sandbox is not there any more.
fn ended(error: &lifecycle::Error) -> bool {
    use lifecycle::Error;
    matches!(
        error,
        Error::Stopped
            | Error::State(StateError::NotFound { .. })
            | Error::Ask(AskError::Connection { .. } | AskError::Refused(_))
    )
}

/// The numbers in the layout of `runc events`.
fn data(stats: &Stats) -> Value {
    const NANOS_PER_MICRO: u64 = 1000;
    let nanos = |micros: u64| micros.saturating_mul(NANOS_PER_MICRO);
    let (cpu, memory) = (&stats.cpu, &stats.memory);
    let hugetlb: serde_json::Map<String, Value> = (stats.hugetlb.iter())
        .map(|size| {
            let numbers = json!({"usage": size.current_bytes, "failcnt": size.limit_hits});
            (size.page_size.clone(), numbers)
        })
        .collect();
    let io = |bytes: bool| -> Vec<Value> {
        let entry = |io: &sandbox_protocol::IoStats, op: &str, value: u64| json!({"major": io.major, "minor": io.minor, "op": op, "value": value});
        let numbers = |io: &sandbox_protocol::IoStats| match bytes {
            true => (io.read_bytes, io.written_bytes),
            false => (io.reads, io.writes),
        };
        let pairs = stats.io.iter().map(|io| (io, numbers(io)));
        pairs.flat_map(|(io, (read, write))| [entry(io, "read", read), entry(io, "write", write)]).collect()
    };
    json!({
        "cpu": {
            "usage": {
                "total": nanos(cpu.usage_micros),
                "kernel": nanos(cpu.system_micros),
                "user": nanos(cpu.user_micros),
            },
            "throttling": {
                "periods": cpu.periods,
                "throttledPeriods": cpu.throttled_periods,
                "throttledTime": nanos(cpu.throttled_micros),
            },
        },
        "memory": {
            "cache": memory.stat.get("file").copied().unwrap_or(0),
            "usage": {
                "limit": memory.limit_bytes.unwrap_or(u64::MAX),
                "usage": memory.current_bytes,
                "max": memory.peak_bytes,
                "failcnt": memory.events.max,
            },
            "swap": {
                "limit": memory.swap_limit_bytes.unwrap_or(u64::MAX),
                "usage": memory.swap_current_bytes,
                "failcnt": 0,
            },
            "raw": memory.stat,
        },
        "pids": { "current": stats.pids.current, "limit": stats.pids.limit.unwrap_or(0) },
        "blkio": {
            "ioServiceBytesRecursive": io(true),
            "ioServicedRecursive": io(false),
        },
        "hugetlb": hugetlb,
        "intel_rdt": {},
        "network_interfaces": null,
    })
}
