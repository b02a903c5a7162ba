//! `sandbox update`.

use std::io::Read;
use std::path::PathBuf;

use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use super::{Error, Global};
use crate::lifecycle;
use crate::quantity::Size;
use crate::spec::resources_of;
use crate::state::SandboxId;

/// The most bytes of a file of limits.
const MAX_BYTES: u64 = 1 << 20;

const NO_RDT: &str = "--l3-cache-schema, --mem-bw-schema: the caches and the memory bandwidth of the host's CPU are not \
                      the guest's to share out (linux.intelRdt): leave them out";

// The arguments of `sandbox update`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The sandbox
    id: SandboxId,
    /// Take the limits from this file, in the form of `linux.resources` in config.json; `-` is standard input
    #[arg(long, short, value_name = "FILE")]
    resources: Option<PathBuf>,
    /// Memory limit, such as 512M; -1 is none
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory: Option<Bytes>,
    /// Memory that is left to the container when others need some
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory_reservation: Option<Bytes>,
    /// Limit of memory and swap together
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory_swap: Option<Bytes>,
    /// CPU time in a period, in microseconds; -1 is no limit
    #[arg(long, value_name = "MICROS", allow_hyphen_values = true)]
    cpu_quota: Option<i64>,
    /// The period, in microseconds
    #[arg(long, value_name = "MICROS")]
    cpu_period: Option<u64>,
    /// Share of CPU time among those that want it, 2 to 262144
    #[arg(long, alias = "cpu-shares", value_name = "SHARES")]
    cpu_share: Option<u64>,
    /// CPU time that may be saved up, in microseconds
    #[arg(long, value_name = "MICROS")]
    cpu_burst: Option<u64>,
    /// Whether the container only gets CPU time that nobody else wants: 0 or 1
    #[arg(long, value_name = "0|1")]
    cpu_idle: Option<i64>,
    /// The CPUs to use
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// The memory nodes to use
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// Share of disk time among those that want it, 10 to 1000
    #[arg(long, value_name = "WEIGHT")]
    blkio_weight: Option<u16>,
    #[arg(long, hide = true, value_name = "MICROS")]
    cpu_rt_period: Option<u64>,
    #[arg(long, hide = true, value_name = "MICROS")]
    cpu_rt_runtime: Option<i64>,
    #[arg(long, hide = true, value_name = "SIZE", allow_hyphen_values = true)]
    kernel_memory: Option<Bytes>,
    #[arg(long, hide = true, value_name = "SIZE", allow_hyphen_values = true)]
    kernel_memory_tcp: Option<Bytes>,
    #[arg(long, hide = true, value_name = "SCHEMA")]
    l3_cache_schema: Option<String>,
    #[arg(long, hide = true, value_name = "SCHEMA")]
    mem_bw_schema: Option<String>,
    /// Limit of processes; -1 is none
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pids_limit: Option<i64>,
}

/// Bytes, or -1 for no limit.
#[derive(Clone, Copy, Debug)]
struct Bytes(i64);

impl std::str::FromStr for Bytes {
    type Err = crate::quantity::QuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "-1" => Ok(Self(-1)),
            text => Ok(Self(i64::try_from(text.parse::<Size>()?.0).unwrap_or(i64::MAX))),
        }
    }
}

/// Changes the limits of a sandbox.
pub fn update(args: &Args, global: &Global) -> Result<u8, Error> {
    // Before anything that is wrong with the limits.
    lifecycle::socket_of_living(&args.id, &global.root()?)?;
    lifecycle::update(&args.id, &global.root()?, args.limits()?)?;
    Ok(0)
}

impl Args {
    fn limits(&self) -> Result<LinuxResources, Error> {
        if self.l3_cache_schema.is_some() || self.mem_bw_schema.is_some() {
            return Err(Error::Usage(NO_RDT.into()));
        }
        let limits = match &self.resources {
            Some(path) => read(path)?,
            None => self.flags(),
        };
        Ok(resources_of(limits)?)
    }

    fn flags(&self) -> Value {
        let mut limits = Map::new();
        let mut set = |group: &str, name: &str, value: Option<Value>| {
            if let (Some(value), Some(group)) =
                (value, limits.entry(group).or_insert_with(|| json!({})).as_object_mut())
            {
                group.insert(name.into(), value);
            }
        };
        set("memory", "limit", self.memory.map(|bytes| json!(bytes.0)));
        set("memory", "reservation", self.memory_reservation.map(|bytes| json!(bytes.0)));
        set("memory", "swap", self.memory_swap.map(|bytes| json!(bytes.0)));
        // Those that a guest does not have are refused by their path.
        set("memory", "kernel", self.kernel_memory.map(|bytes| json!(bytes.0)));
        set("memory", "kernelTCP", self.kernel_memory_tcp.map(|bytes| json!(bytes.0)));
        set("blockIO", "weight", self.blkio_weight.map(Value::from));
        set("cpu", "realtimePeriod", self.cpu_rt_period.map(Value::from));
        set("cpu", "realtimeRuntime", self.cpu_rt_runtime.map(Value::from));
        set("cpu", "quota", self.cpu_quota.map(Value::from));
        set("cpu", "period", self.cpu_period.map(Value::from));
        set("cpu", "shares", self.cpu_share.map(Value::from));
        set("cpu", "burst", self.cpu_burst.map(Value::from));
        set("cpu", "idle", self.cpu_idle.map(Value::from));
        set("cpu", "cpus", self.cpuset_cpus.clone().map(Value::from));
        set("cpu", "mems", self.cpuset_mems.clone().map(Value::from));
        set("pids", "limit", self.pids_limit.map(Value::from));
        limits.retain(|_, group| group.as_object().is_some_and(|group| !group.is_empty()));
        Value::Object(limits)
    }
}

fn read(path: &PathBuf) -> Result<Value, Error> {
    let error = |error: &dyn std::fmt::Display| {
        Error::Usage(format!("--resources: {} cannot be read: {error}", path.display()))
    };
    let mut text = Vec::new();
    let mut source: Box<dyn Read> = match path.to_str() {
        Some("-") => Box::new(std::io::stdin()),
        _ => Box::new(std::fs::File::open(path).map_err(|e| error(&e))?),
    };
    source.by_ref().take(MAX_BYTES).read_to_end(&mut text).map_err(|e| error(&e))?;
    serde_json::from_slice(&text).map_err(|e| error(&e))
}
