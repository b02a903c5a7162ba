//! `sandbox ps`.

use sandbox_protocol::{ProcessInfo, Processes};

use super::{Error, Global, print};
use crate::lifecycle;
use crate::printable::printable;
use crate::state::SandboxId;

// The arguments of `sandbox ps`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The sandbox
    id: SandboxId,
    /// Form of the list; json has the ids of the processes that the sandbox is on the host
    #[arg(long, short, value_enum, default_value = "table")]
    format: Form,
    /// Accepted for engines: the columns are always the same
    #[arg(hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
    _ps_options: Vec<String>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Form {
    Table,
    Json,
}

/// Lists the processes of a sandbox: for people those of the guest, with the ids that they have there; for engines,
/// who look the ids up on the host, those of the host. An id of the guest would be somebody else's there.
pub fn ps(args: &Args, global: &Global) -> Result<u8, Error> {
    let text = match args.format {
        Form::Json => {
            format!("{}\n", serde_json::json!(lifecycle::host_processes(&args.id, &global.root()?)?))
        }
        Form::Table => {
            let Processes { processes, .. } = lifecycle::processes(&args.id, &global.root()?)?;
            table(&processes)
        }
    };
    print(&text)?;
    Ok(0)
}

/// Engines find the process id by the word PID in the first line.
fn table(processes: &[ProcessInfo]) -> String {
    let mut text =
        format!("{:>5} {:>7} {:>7} {:1} {:>8} {:8} {}\n", "UID", "PID", "PPID", "S", "TIME", "TTY", "CMD");
    for process in processes {
        let seconds = process.cpu_millis / 1000;
        let time = format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
        let tty = process.tty.as_deref().map_or_else(|| "?".into(), printable);
        let command = printable(&process.command);
        let ProcessInfo { uid, pid, ppid, state, .. } = process;
        text += &format!("{uid:>5} {pid:>7} {ppid:>7} {state:1} {time:>8} {tty:8} {command}\n");
    }
    text
}
