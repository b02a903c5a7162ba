//! `sandbox list`.

use sandbox_vmm_api::MachineKind;

use super::{Error, Global, print};
use crate::log::Log;
use crate::state::{Record, list as records};

// The arguments of `sandbox list`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Form of the list
    #[arg(long, short, value_enum, default_value = "table")]
    format: Form,
    /// Ids only
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Form {
    Table,
    Json,
}

/// Lists the sandboxes that run.
pub fn list(args: &Args, global: &Global, log: &Log) -> Result<u8, Error> {
    let (records, errors) = records(&global.root()?)?;
    errors.iter().for_each(|error| log.error(&error.to_string()));
    let text = match (args.quiet, args.format) {
        (true, _) => records.iter().map(|record| format!("{}\n", record.id)).collect(),
        (false, Form::Json) => format!("{}\n", serde_json::json!(records)),
        (false, Form::Table) => table(&records),
    };
    print(&text)?;
    Ok(0)
}

/// runc's columns, by which scripts find theirs, and then ours.
fn table(records: &[Record]) -> String {
    let header = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "MACHINE"].map(String::from);
    let rows: Vec<[String; 6]> = std::iter::once(header).chain(records.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 6] = std::array::from_fn(width);
    let line = |row: &[String; 6]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn row(record: &Record) -> [String; 6] {
    let machine = record.machine.map_or("-", MachineKind::name);
    [
        record.id.to_string(),
        record.pid.to_string(),
        record.status.name().into(),
        record.bundle.display().to_string(),
        record.created.clone(),
        machine.into(),
    ]
}
