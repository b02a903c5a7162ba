//! `sandbox check`: what this host offers.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sandbox_vmm_api::{MachineKind, Probe, ProbedMachine};
use serde::Serialize;

use super::{Error, Global, print, security};
use crate::artefact::Artefact;
use crate::config::{Config, Machine};
use crate::exit;
use crate::state::SandboxId;

// The arguments of `sandbox check`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Form of the report
    #[arg(long, short, value_enum, default_value = "text")]
    format: Form,
    /// What holds the machine of this running sandbox, instead
    #[arg(long, value_name = "ID")]
    security: Option<SandboxId>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Form {
    Text,
    Json,
}

/// Why the host could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The probe did not run.
    #[error("cannot run `{} probe`: {why}", program.display())]
    Probe {
        /// The program.
        program: PathBuf,
        /// What happened.
        why: String,
    },
    /// The sandbox has no machine.
    #[error("sandbox {id} has no machine at the moment: it must be created or running")]
    NotRunning {
        /// The sandbox.
        id: SandboxId,
    },
    /// The sandbox's processes could not be looked at, or ended meanwhile.
    #[error("cannot look at the processes of sandbox {id}: {why}")]
    Look {
        /// The sandbox.
        id: SandboxId,
        /// Why.
        why: std::io::Error,
    },
}

/// All that the command reports.
#[derive(Debug, Serialize)]
struct Report {
    /// Whether `sandbox run` can work here.
    ready: bool,
    items: Vec<Item>,
    /// The machine that `--machine auto` takes.
    auto: Option<MachineKind>,
    reason: String,
}

#[derive(Debug, Serialize)]
struct Item {
    name: &'static str,
    verdict: Verdict,
    finding: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// It is there and works.
    Ok,
    /// It is not, and something else does its work.
    Missing,
    /// It is not, and nothing runs without it.
    Failed,
}

/// Reports what the host offers. The exit code says whether a sandbox can run.
pub fn check(args: &Args, global: &Global) -> Result<u8, Error> {
    if let Some(id) = &args.security {
        let report = security::look(id, &global.root()?)?;
        match args.format {
            Form::Json => print(&format!("{}\n", serde_json::json!(report)))?,
            Form::Text => print(&security::text(&report))?,
        }
        return Ok(0);
    }
    let report = look(global)?;
    match args.format {
        Form::Json => print(&format!("{}\n", serde_json::json!(report)))?,
        Form::Text => print(&text(&report))?,
    }
    Ok(if report.ready { 0 } else { exit::FAILED })
}

fn look(global: &Global) -> Result<Report, Error> {
    let (config, configuration) = configuration(global);
    let mut items = vec![user(), cgroups(), configuration];
    items.extend([
        artefact("guest kernel", Artefact::Kernel, &config),
        artefact("guest image", Artefact::Image, &config),
        artefact("sandbox-vmm", Artefact::Vmm, &config),
    ]);
    let (auto, reason) = match Artefact::Vmm.find(&config) {
        Ok(program) => {
            let probe = probe(&program)?;
            items.push(machine("KVM", &probe.kvm));
            items.push(machine("QEMU", &probe.qemu));
            (probe.auto, probe.reason)
        }
        Err(_) => (None, "the machines cannot be probed without sandbox-vmm".into()),
    };
    let ready = auto.is_some() && items.iter().all(|item| item.verdict != Verdict::Failed);
    Ok(Report { ready, items, auto, reason })
}

fn user() -> Item {
    let root = rustix::process::geteuid().is_root();
    Item {
        name: "user",
        verdict: if root { Verdict::Ok } else { Verdict::Failed },
        finding: if root { "root".into() } else { "not root".into() },
        remedy: (!root).then(|| "run as root: the machine's process needs it to lock itself in".into()),
    }
}

fn cgroups() -> Item {
    let v2 = |path: &str| Path::new(path).join("cgroup.controllers").exists();
    let finding = if v2("/sys/fs/cgroup") {
        "version 2"
    } else if v2("/sys/fs/cgroup/unified") {
        "version 1, with an empty version 2 beside it"
    } else if Path::new("/sys/fs/cgroup").is_dir() {
        "version 1"
    } else {
        "none"
    };
    // The guest has cgroups of its own, in which the container's limits are set.
    Item {
        name: "host cgroups",
        verdict: Verdict::Ok,
        finding: format!("{finding}; not needed"),
        remedy: None,
    }
}

/// What the operator wants of machines, and whether it can be read.
fn configuration(global: &Global) -> (Machine, Item) {
    let item = |verdict, finding, remedy| Item { name: "configuration", verdict, finding, remedy };
    match Config::load(global.config.as_deref()) {
        Ok(config) if config.files.is_empty() => {
            (config.machine, item(Verdict::Ok, "none; the defaults hold".into(), None))
        }
        Ok(config) => {
            let files: Vec<String> = config.files.iter().map(|path| path.display().to_string()).collect();
            (config.machine, item(Verdict::Ok, files.join(", "), None))
        }
        Err(error) => {
            let remedy = "docs/configuration.md has each key".into();
            (Config::default().machine, item(Verdict::Failed, error.to_string(), Some(remedy)))
        }
    }
}

fn artefact(name: &'static str, artefact: Artefact, config: &Machine) -> Item {
    match artefact.find(config) {
        Ok(path) => Item { name, verdict: Verdict::Ok, finding: path.display().to_string(), remedy: None },
        Err(error) => {
            let remedy = format!("build it with `make`, or name it with {}", artefact.variable());
            Item { name, verdict: Verdict::Failed, finding: error.to_string(), remedy: Some(remedy) }
        }
    }
}

fn machine(name: &'static str, probed: &ProbedMachine) -> Item {
    let verdict = if probed.usable { Verdict::Ok } else { Verdict::Missing };
    Item { name, verdict, finding: probed.finding.clone(), remedy: probed.remedy.clone() }
}

fn probe(program: &Path) -> Result<Probe, CheckError> {
    let error = |why: String| CheckError::Probe { program: program.into(), why };
    let output = Command::new(program)
        .arg("probe")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(|e| error(e.to_string()))?;
    if !output.status.success() {
        return Err(error(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    serde_json::from_slice(&output.stdout).map_err(|e| error(e.to_string()))
}

fn text(report: &Report) -> String {
    let width = report.items.iter().map(|item| item.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for item in &report.items {
        let mark = match item.verdict {
            Verdict::Ok => "ok",
            Verdict::Missing => "no",
            Verdict::Failed => "FAIL",
        };
        text += &format!("{mark:4}  {:width$}  {}\n", item.name, item.finding);
        if let Some(remedy) = item.remedy.as_ref().filter(|_| item.verdict != Verdict::Ok) {
            text += &format!("      {:width$}  → {remedy}\n", "");
        }
    }
    let auto = report.auto.map_or("none", MachineKind::name);
    text += &format!("\nmachine taken by default: {auto} ({})\n", report.reason);
    text += if report.ready { "ready\n" } else { "NOT ready: see what failed above\n" };
    text
}
